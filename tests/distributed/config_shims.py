"""What lets the recipes run their GPU configurations on CPUs, over Gloo. The sharding itself is the frameworks' own."""

from __future__ import annotations

import os
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.commands import launch
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedType
from accelerate.utils.launch import prepare_deepspeed_cmd_env, prepare_multi_gpu_env
from torch.distributed.fsdp import FullyShardedDataParallel

SET_BY_LAUNCHER = ("ACCELERATE_", "FSDP_", "PARALLELISM_CONFIG_")


def become_launched(file: Path) -> None:
    """Makes this rank one that `accelerate launch --config_file FILE` started on GPUs, in all but device and precision.

    Accelerate shards only if it sees several GPUs; on CPUs it takes DDP, without a word.
    """
    for name in [each for each in os.environ if each.startswith(SET_BY_LAUNCHER)]:
        del os.environ[name]
    environment = _launcher_environment(file)
    os.environ.update(environment)
    AcceleratorState._reset_state(reset_partial_state=True)
    state = PartialState(cpu=True)
    state.device = torch.device("cpu")
    if "ACCELERATE_USE_FSDP" in environment:
        state.distributed_type = DistributedType.MULTI_GPU


def _launcher_environment(file: Path) -> dict[str, str]:
    """The variables by which `accelerate launch --config_file FILE --mixed_precision no` tells ranks what to do."""
    arguments = launch.launch_command_parser().parse_args(
        ["--config_file", str(file), "--mixed_precision", "no", "--main_process_port", "0", "script.py"]
    )
    arguments, defaults, _ = launch._validate_launch_command(arguments)
    if arguments.use_deepspeed:
        arguments.deepspeed_fields_from_accelerate_config = ",".join(defaults.deepspeed_config)
        _, environment = prepare_deepspeed_cmd_env(arguments)
    else:
        environment = prepare_multi_gpu_env(arguments)
    return {name: value for name, value in environment.items() if name.startswith(SET_BY_LAUNCHER)}


def allow_cpu() -> None:
    """Takes away what refuses CPUs or ends the process group, in all four frameworks. Once a process."""
    import deepspeed
    import torch.distributed.fsdp._init_utils as fsdp1
    from lightning.pytorch import strategies

    Accelerator.end_training = lambda _: None  # the next configuration runs in the same group
    fsdp1._get_compute_device = lambda *_: torch.device("cpu")  # finds cpu and cpu:0 inconsistent
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # would be compiled, and Gloo does without
    strategies.FSDPStrategy, strategies.DeepSpeedStrategy = _cpu_strategies()


def _cpu_strategies() -> tuple[type, type]:
    from lightning.fabric.utilities.seed import reset_seed
    from lightning.pytorch.strategies import DeepSpeedStrategy, FSDPStrategy

    class CPUFSDPStrategy(FSDPStrategy):
        def _setup_model(self, model: torch.nn.Module) -> torch.nn.Module:
            return FullyShardedDataParallel(
                model,
                sharding_strategy=self.sharding_strategy,
                mixed_precision=self.mixed_precision_config,
                device_id=torch.device("cpu"),
                **self.kwargs,
            )

    class CPUDeepSpeedStrategy(DeepSpeedStrategy):
        root_device = property(lambda self: torch.device("cpu", self.local_rank))  # its index is a rank for DeepSpeed

        def setup_environment(self) -> None:
            super(DeepSpeedStrategy, self).setup_environment()

        def setup_distributed(self) -> None:
            reset_seed()
            self.set_world_ranks()
            self._init_deepspeed_distributed()

    return CPUFSDPStrategy, CPUDeepSpeedStrategy
