"""A policy in training, whatever wraps it: what the tests of sources need of each framework."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.tensor import DTensor
from transformers.modeling_layers import GradientCheckpointingLayer

Tensors = dict[str, torch.Tensor]
LEARNING_RATE = 1e-3


class Trained:
    """A policy in training, wrapped by one framework.

    Attributes:
        policy: the module under the wrappers; has the names of the one that was passed to `shard`.
        model: what the trainer holds, and a source is opened on.
        optimizer: the one that holds the state.
    """

    def __init__(self, policy: nn.Module, model: Any) -> None:
        self.policy, self.model = policy, model
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        self.optimizer: Any = torch.optim.AdamW(trained, LEARNING_RATE, foreach=False)

    def step(self, tokens: torch.Tensor) -> None:
        self.model(input_ids=tokens, labels=tokens).loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()

    def full(self) -> Tensors:
        """Copies of all parameters in full, tied ones under each name, by the framework's own means. Collective."""
        options = StateDictOptions(full_state_dict=True)
        state = get_model_state_dict(self.policy, options=options)
        return {name: tensor.detach().clone() for name, tensor in state.items()}

    def held(self) -> Tensors:
        """What this rank holds of the parameters and buffers: the memory itself."""
        named = [*self.policy.named_parameters(), *self.policy.named_buffers()]
        return {name: memory(tensor) for name, tensor in named}

    def optimizer_state(self) -> Tensors:
        """What this rank holds of the optimizer's state: the memory itself."""
        return {
            f"{number}.{key}": memory(value)
            for number, state in enumerate(self.optimizer.state.values())
            for key, value in state.items()
            if isinstance(value, torch.Tensor)
        }


def memory(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().to_local() if isinstance(tensor, DTensor) else tensor.detach()


def layers(policy: nn.Module) -> list[nn.Module]:
    return [module for module in policy.modules() if isinstance(module, GradientCheckpointingLayer)]
