"""Policies with an adapter: one builder for each way of PEFT that can be merged, all weights of the adapter random.

Import only after `transformers`; building one takes some milliseconds.
"""

from __future__ import annotations

import importlib.util
import warnings
from collections.abc import Callable
from typing import Any

import peft
import torch
from peft.tuners.lora.config import BdLoraConfig, KasaConfig, MontecloraConfig, VeloraConfig
from torch import nn

from tests.tiny_models import build

Builder = Callable[[torch.dtype], Any]

ATTENTION = ["q_proj", "v_proj"]
LINEAR = ["q_proj", "v_proj", "up_proj"]
LORA = {"r": 8, "lora_alpha": 16, "target_modules": LINEAR}


def randomize(model: nn.Module, seed: int = 1) -> None:
    """Gives everything that trains values of its own, so that no adapter is the identity that it starts as."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                noise = torch.randn(parameter.shape, generator=generator) * 0.05
                # On top of what is there: magnitudes and scales begin near one, and stay valid.
                parameter.add_(noise.to(parameter.dtype))


def quiet(make: Callable[[], Any]) -> Any:
    """Calls `make` without PEFT's advice about tied weights, sizes and dtypes, which are chosen here on purpose."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return make()


def wrap(base: nn.Module, config: Any, **options: Any) -> Any:
    """`get_peft_model`, with a random adapter."""
    model = quiet(lambda: peft.get_peft_model(base, config, **options)).eval()
    randomize(model)
    return model


def base(kind: str, dtype: torch.dtype, **config: Any) -> Any:
    """A tiny model to wrap; those of qwen3 have biases, and `qwen3_1` one layer."""
    if kind == "qwen3_1":
        kind, config = "qwen3", {"num_hidden_layers": 1, **config}
    if kind == "qwen3":
        config = {"attention_bias": True, **config}
    return build(kind, **config).to(dtype)


def _on(kind: str, config_class: str, /, **settings: Any) -> Builder:
    def builder(dtype: torch.dtype) -> Any:
        return wrap(base(kind, dtype), getattr(peft, config_class)(**settings))

    return builder


def _lora(kind: str = "qwen3", **settings: Any) -> Builder:
    return _on(kind, "LoraConfig", **{**LORA, **settings})


def two_adapters(dtype: torch.dtype) -> Any:
    """Two LoRA adapters, both active."""
    return _two(dtype, {})


def _two(dtype: torch.dtype, settings: dict[str, Any]) -> Any:
    model = wrap(base("qwen3", dtype), peft.LoraConfig(**LORA, **settings))
    quiet(lambda: model.add_adapter("second", peft.LoraConfig(r=4, lora_alpha=8, target_modules=ATTENTION, **settings)))
    model.base_model.set_adapter(["default", "second"])
    randomize(model, seed=2)
    return model


def _one_of_two(dtype: torch.dtype) -> Any:
    model = _two(dtype, {})
    model.set_adapter("second")
    return model


def _mixed(dtype: torch.dtype) -> Any:
    model = wrap(base("qwen3", dtype), peft.LoraConfig(**LORA), mixed=True)
    quiet(lambda: model.add_adapter("second", peft.LoHaConfig(r=4, alpha=8, target_modules=["q_proj", "k_proj"])))
    model.set_adapter(["default", "second"])
    randomize(model, seed=2)
    return model


EXPERTS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
GPT2 = {"target_modules": ["c_attn", "c_proj"], "fan_in_fan_out": True}

LORA_CASES: dict[str, Builder] = {
    "lora": _lora(),
    "lora_two_active": two_adapters,
    "lora_one_of_two": _one_of_two,
    "rslora": _lora(use_rslora=True, r=16),
    "dora": _lora(use_dora=True),
    "dora_two_active": lambda dtype: _two(dtype, {"use_dora": True}),
    "lora_bias": _lora(target_modules=["q_proj", "k_proj"], lora_bias=True),
    "bias_all": _lora(bias="all"),
    "modules_to_save": _lora(modules_to_save=["lm_head", "embed_tokens", "input_layernorm"]),
    "trainable_tokens": _lora(trainable_token_indices=[1, 5]),
    "trainable_tokens_tied": _lora("llama", trainable_token_indices=[1, 5]),
    "embedding": _lora(target_modules=["embed_tokens", "q_proj"]),
    "embedding_dora": _lora(target_modules=["embed_tokens", "q_proj"], use_dora=True),
    "patterns": _lora(rank_pattern={"q_proj": 4}, alpha_pattern={"v_proj": 64}),
    "pissa": _lora(init_lora_weights="pissa"),
    "mica": _lora(init_lora_weights="mica"),
    "kasa": _lora(kasa_config=KasaConfig()),
    "monteclora": _lora(monteclora_config=MontecloraConfig()),
    "velora": _lora(velora_config=VeloraConfig(num_groups=8)),
    "bdlora": _lora(use_bdlora=BdLoraConfig(target_modules_bd_a=ATTENTION, target_modules_bd_b=["up_proj"], nblocks=2)),
    "gpt2": _lora("gpt2", **GPT2),
    "gpt2_dora": _lora("gpt2", **GPT2, use_dora=True),
    "moe_experts": _lora("qwen3_moe", target_modules=["q_proj"], target_parameters=EXPERTS),
    "moe_one_parameter": _lora("mixtral", target_modules=["q_proj"], target_parameters=EXPERTS[1:]),
    "mixed": _mixed,
}
"""Kinds of LoRA and what it comes with."""

OTHER_CASES: dict[str, Builder] = {
    "adalora": _on("qwen3_1", "AdaLoraConfig", init_r=8, target_r=4, total_step=10, target_modules=LINEAR),
    "adamss": _on("qwen3_1", "AdamssConfig", r=8, num_subspaces=2, subspace_rank=1, target_modules=ATTENTION),
    "beft": _on("qwen3_1", "BeftConfig", target_modules=["v_proj"]),
    "boft": _on("qwen3_1", "BOFTConfig", boft_block_size=4, target_modules=LINEAR),
    "c3a": _on("qwen3_1", "C3AConfig", block_size=16, target_modules=LINEAR),
    "deft": _on("qwen3_1", "DeftConfig", r=4, target_modules=LINEAR),
    "delora": _on("qwen3_1", "DeloraConfig", r=4, target_modules=LINEAR),
    "fourierft": _on("qwen3_1", "FourierFTConfig", n_frequency=20, target_modules=LINEAR),
    "frod": _on("qwen3_1", "FrodConfig", target_modules=["q_proj"], progressbar=False),
    "glora": _on("qwen3_1", "GloraConfig", r=4, target_modules=LINEAR),
    "gralora": _on("qwen3_1", "GraloraConfig", r=8, target_modules=LINEAR),
    "hira": _on("qwen3_1", "HiraConfig", r=4, target_modules=LINEAR),
    "hra": _on("qwen3_1", "HRAConfig", r=4, target_modules=LINEAR),
    "ia3": _on("qwen3_1", "IA3Config", target_modules=["k_proj", "up_proj"], feedforward_modules=["up_proj"]),
    "ln_tuning": _on("qwen3_1", "LNTuningConfig", target_modules=["input_layernorm", "model.norm"]),
    "loha": _on("qwen3_1", "LoHaConfig", r=4, target_modules=LINEAR),
    "lokr": _on("qwen3_1", "LoKrConfig", r=4, target_modules=LINEAR),
    "miss": _on("qwen3_1", "MissConfig", r=8, target_modules=LINEAR),
    "miss_bat": _on("qwen3_1", "MissConfig", r=8, init_weights="bat", target_modules=ATTENTION),
    "oft": _on("qwen3_1", "OFTConfig", oft_block_size=8, target_modules=LINEAR),
    "osf": _on("qwen3_1", "OSFConfig", effective_rank=8, target_modules=ATTENTION),
    "peanut": _on("qwen3_1", "PeanutConfig", r=4, target_modules=LINEAR),
    "psoft": _on("qwen3_1", "PsoftConfig", r=4, target_modules=ATTENTION),
    "pvera": _on("qwen3_1", "PveraConfig", r=8, target_modules=ATTENTION),
    "randlora": _on("qwen3_1", "RandLoraConfig", r=16, target_modules=ATTENTION),
    "road": _on("qwen3_1", "RoadConfig", group_size=32, target_modules=LINEAR),
    "shira": _on("qwen3_1", "ShiraConfig", r=4, random_seed=1, target_modules=LINEAR),
    "supertuning": _on("qwen3_1", "SupertuningConfig", r=4, target_modules=ATTENTION),
    "tinylora": _on("qwen3_1", "TinyLoraConfig", u=4, target_modules=LINEAR),
    "token_layer": _on("qwen3_1", "TrainableTokensConfig", token_indices=[1, 5], target_modules=["embed_tokens"]),
    "unilora": _on("qwen3_1", "UniLoraConfig", r=4, theta_d_length=64, target_modules=ATTENTION),
    "vblora": _on("qwen3_1", "VBLoRAConfig", r=4, num_vectors=16, vector_length=32, target_modules=ATTENTION),
    "vera": _on("qwen3_1", "VeraConfig", r=16, target_modules=ATTENTION),
    "waveft": _on("qwen3_1", "WaveFTConfig", n_frequency=20, target_modules=LINEAR),
}
"""Every other way of PEFT that can be merged."""

if importlib.util.find_spec("sklearn") is None:
    del OTHER_CASES["adamss"]  # clusters with scikit-learn when it is built

CASES = {**LORA_CASES, **OTHER_CASES}
"""Name -> builder of a `PeftModel` (or `PeftMixedModel`) whose base is of the given dtype."""
