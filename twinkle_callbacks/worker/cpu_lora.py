"""A correction of vLLM's LoRA on CPU: rows without an adapter stay as the base model computed them.

vLLM marks such a row with the index -1, and the operators of `vllm/lora/ops/torch_ops/lora_ops.py` (up to 0.32) take
`weights[-1]` for it, the weights in the last slot. Once `max_loras` adapters are loaded, a request to the base model
that shares a batch with an adapter gets another adapter's weights; with an adapter of the output head or of the
embeddings the same happens to it. Where versions follow each other every slot is soon in use.

Remove this when tests/vllm/test_adapter_store.py::test_base_requests_stay_base_beside_adapters_in_every_slot passes
without it.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch


def correct_cpu_lora(manager: Any) -> None:
    """Makes one `LoRAModelManager` leave rows without an adapter alone; other managers stay as they are. Idempotent.

    Does nothing on another platform, whose kernels skip these rows.
    """
    from vllm.lora.punica_wrapper.punica_cpu import PunicaWrapperCPU

    for wrapper in manager.punica_wrapper_mapping.values():
        if type(wrapper) is PunicaWrapperCPU:
            # The layers already hold this object, so it is given other methods rather than replaced.
            wrapper.__class__ = _corrected()


@functools.cache
def _corrected() -> type:
    from vllm.lora.punica_wrapper.punica_cpu import PunicaWrapperCPU

    class CorrectedPunicaWrapperCPU(PunicaWrapperCPU):
        """The wrapper of one model's LoRA layers. Shapes: y [rows, out], with an index for each row."""

        def add_expand(self, y: torch.Tensor, *args: Any, **kwargs: Any) -> None:
            with self._base_rows_kept(y, self.token_lora_indices):
                super().add_expand(y, *args, **kwargs)

        def add_lora_embedding(self, y: torch.Tensor, *args: Any, **kwargs: Any) -> None:
            with self._base_rows_kept(y, self.token_lora_indices):
                super().add_lora_embedding(y, *args, **kwargs)

        def add_lora_logits(self, y: torch.Tensor, *args: Any, **kwargs: Any) -> None:
            with self._base_rows_kept(y, self.sampler_indices):
                super().add_lora_logits(y, *args, **kwargs)

        @contextmanager
        def _base_rows_kept(self, y: torch.Tensor, indices: torch.Tensor) -> Iterator[None]:
            rows = y.view(-1, y.shape[-1])
            before = rows.clone()
            yield
            rows.copy_(torch.where((indices >= 0).unsqueeze(-1), rows, before))

    return CorrectedPunicaWrapperCPU
