"""How a policy is spread over several GPUs: strategies for the Lightning recipe, tensor parallelism for both recipes.

Lightning is imported where it is needed, so that the Accelerate recipe runs without it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Replicate, distribute_module
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    ParallelStyle,
    RowwiseParallel,
    SequenceParallel,
    parallelize_module,
)
from transformers import Qwen3ForCausalLM
from transformers.models.qwen3.modeling_qwen3 import Qwen3DecoderLayer

from recipes.config import RecipeConfig
from twinkle_callbacks.errors import ConfigError
from twinkle_callbacks.sources.names import unwrap

if TYPE_CHECKING:
    from lightning.pytorch.strategies import Strategy
    from torch.distributed.device_mesh import DeviceMesh

BY_CONFIGURE_MODEL = ("fsdp2", "fsdp2_tp")  # strategies under which the LightningModule shards the policy itself


def share(data: DeviceMesh, tensor: DeviceMesh) -> dict[str, Any]:
    """Which share of the samples this rank collects, as arguments of `Collector`, from two dimensions of a mesh."""
    return {"rank": data.get_local_rank(), "world_size": data.size(), "peers": tensor.get_group()}


def trainer_options(config: RecipeConfig) -> dict[str, Any]:
    """The arguments of `lightning.pytorch.Trainer` that follow from the section `trainer`."""
    chosen = config.trainer
    # Lightning refuses to clip under FSDP1, so there the LightningModule does it. FSDP2 casts by its own policy.
    clip = None if chosen.strategy == "fsdp1" else config.optimizer.grad_clip
    precision = "32-true" if chosen.strategy in BY_CONFIGURE_MODEL else chosen.precision
    return {
        "accelerator": chosen.accelerator,
        "devices": chosen.devices,
        "strategy": make_strategy(config),
        "precision": precision,
        "gradient_clip_val": clip,
    }


def make_strategy(config: RecipeConfig) -> Strategy | str:
    """The Lightning strategy that `trainer.strategy` names."""
    from lightning.pytorch import strategies

    chosen = config.trainer
    match chosen.strategy:
        case "fsdp1":
            # The policy is a unit of its own, so that it can be called and gathered apart from the LightningModule.
            return strategies.FSDPStrategy(auto_wrap_policy={Qwen3DecoderLayer, Qwen3ForCausalLM})
        case "fsdp2" | "fsdp2_tp":
            tensor_parallel = chosen.tensor_parallel_size
            return strategies.ModelParallelStrategy(
                data_parallel_size=chosen.devices // tensor_parallel, tensor_parallel_size=tensor_parallel
            )
        case "zero1" | "zero2" | "zero3":
            samples = config.data.prompts_per_step * config.rollouts.samples_per_prompt // chosen.devices
            return strategies.DeepSpeedStrategy(stage=int(chosen.strategy[-1]), logging_batch_size_per_gpu=samples)
        case _:
            return chosen.strategy


def shard(policy: nn.Module, mesh: DeviceMesh, precision: str) -> None:
    """Shards a Qwen3, below an adapter or not, by FSDP2, layer by layer, over a mesh of one dimension.

    Computes in bfloat16 if the precision says so.
    """
    casting = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    options = {"mesh": mesh, "mp_policy": casting if precision == "bf16-mixed" else MixedPrecisionPolicy()}
    for layer in unwrap(policy).model.layers:
        fully_shard(layer, **options)
    fully_shard(policy, **options)


def split_layers(policy: nn.Module, mesh: DeviceMesh) -> None:
    """Makes the policy tensor parallel over a mesh of one dimension, whose size divides the key-value heads.

    Every parameter becomes a DTensor, those that stay whole too: clipping and the optimizer want them all on one mesh
    once FSDP2 adds its dimension.

    Raises:
        ConfigError: the policy is below an adapter, whose layers the plan does not name.
    """
    if unwrap(policy) is not policy:
        raise ConfigError("an adapter cannot be trained tensor parallel: leave out the section adapter, or use fsdp2")
    # Between projections and o_proj a rank has some of the heads: dimension 2 of (batch, sequence, head, head_dim).
    per_head = SequenceParallel(sequence_dim=2, use_local_output=True)
    layer = {
        "input_layernorm": _Whole(),
        "self_attn.q_proj": ColwiseParallel(),
        "self_attn.k_proj": ColwiseParallel(),
        "self_attn.v_proj": ColwiseParallel(),
        "self_attn.q_norm": per_head,
        "self_attn.k_norm": per_head,
        "self_attn.o_proj": RowwiseParallel(),
        "post_attention_layernorm": _Whole(),
        "mlp.gate_proj": ColwiseParallel(),
        "mlp.up_proj": ColwiseParallel(),
        "mlp.down_proj": RowwiseParallel(),
    }
    plan = {f"model.layers.*.{name}": style for name, style in layer.items()}
    plan["model.embed_tokens"] = RowwiseParallel(input_layouts=Replicate())
    plan["model.norm"] = _Whole()
    plan["lm_head"] = ColwiseParallel(output_layouts=Replicate())
    parallelize_module(policy, mesh, plan)


class _Whole(ParallelStyle):
    """Each rank has all of the module and computes all of it, from tensors and to tensors that are whole."""

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        def wrap(_: nn.Module, inputs: tuple[torch.Tensor, ...], mesh: DeviceMesh) -> tuple[DTensor, ...]:
            return tuple(DTensor.from_local(each, mesh, [Replicate()], run_check=False) for each in inputs)

        def unwrap(_: nn.Module, output: DTensor, mesh: DeviceMesh) -> torch.Tensor:
            return output.to_local()

        return distribute_module(module, device_mesh, None, wrap, unwrap)
