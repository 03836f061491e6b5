"""The source over a folder of safetensors files, as `save_pretrained` and the model hubs write it."""

from __future__ import annotations

import json
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from twinkle_callbacks.buckets.layout import TensorSpec
from twinkle_callbacks.buckets.packing import dtype_name
from twinkle_callbacks.errors import SourceError
from twinkle_callbacks.sources.base import WeightSource
from twinkle_callbacks.sources.dtypes import sent_as

_INDEX = "model.safetensors.index.json"
_SINGLE = "model.safetensors"
_ADAPTER = "adapter_model.safetensors"

_TORCH_NAMES = {
    "BOOL": "bool",
    "U8": "uint8",
    "I8": "int8",
    "U16": "uint16",
    "I16": "int16",
    "U32": "uint32",
    "I32": "int32",
    "U64": "uint64",
    "I64": "int64",
    "F8_E4M3": "float8_e4m3fn",
    "F8_E4M3FNUZ": "float8_e4m3fnuz",
    "F8_E5M2": "float8_e5m2",
    "F8_E5M2FNUZ": "float8_e5m2fnuz",
    "F8_E8M0": "float8_e8m0fnu",
    "F16": "float16",
    "BF16": "bfloat16",
    "F32": "float32",
    "F64": "float64",
    "C64": "complex64",
}


class CheckpointSource(WeightSource):
    """Streams a checkpoint from disk, one tensor at a time, in the order in which the files hold them.

    Names and layouts are already those that vLLM loads. Opening reads the files' headers only.

    Args:
        path: folder with `model.safetensors`, or with an index and its shards, or with any `*.safetensors` files.
        dtype: dtype that floating point tensors are cast to, except 8-bit ones; None casts nothing.

    Attributes:
        path: the folder.

    Raises:
        SourceError: the folder is missing, holds no safetensors, or is torn: a file is missing or cut off, or the index
            names tensors that no file holds.
    """

    def __init__(self, path: str | Path, *, dtype: torch.dtype | None = None) -> None:
        self.path = Path(path)
        self._dtype = dtype
        files, indexed = _files(self.path)
        self._on_disk = {file: _read_header(file) for file in files}
        holders: dict[str, str] = {}
        for file, specs in self._on_disk.items():
            for spec in specs:
                if spec.name in holders:
                    raise SourceError(f"{self.path}: both {holders[spec.name]} and {file.name} hold {spec.name!r}")
                holders[spec.name] = file.name
        missing = sorted(indexed - holders.keys())
        if missing:
            raise SourceError(
                f"{self.path} is torn: the index names {len(missing)} tensors that no file holds, such as "
                f"{missing[0]!r}; save or copy the checkpoint again"
            )
        if not holders:
            raise SourceError(f"{self.path}: the safetensors files hold no tensors; give the folder of a whole model")

    def specs(self) -> list[TensorSpec]:
        return [
            TensorSpec(spec.name, dtype_name(self._sent_as(spec)), spec.shape)
            for specs in self._on_disk.values()
            for spec in specs
        ]

    @torch.no_grad()
    def stream(self) -> Generator[tuple[str, torch.Tensor], None, None]:
        for file, specs in self._on_disk.items():
            if _read_header(file) != specs:
                raise SourceError(f"{file} changed since the source was opened; open a new source")
            with _opened(file) as tensors:
                for spec in specs:
                    yield spec.name, tensors.get_tensor(spec.name).to(self._sent_as(spec))

    def _sent_as(self, spec: TensorSpec) -> torch.dtype:
        return sent_as(getattr(torch, spec.dtype), self._dtype)


def _files(folder: Path) -> tuple[list[Path], set[str]]:
    """Returns the folder's weight files, and the names its index promises (none without an index)."""
    if not folder.is_dir():
        what = "is a file" if folder.exists() else "does not exist"
        raise SourceError(f"checkpoint folder {folder} {what}; give a folder with safetensors files")
    if (folder / _INDEX).exists():
        weight_map = _read_index(folder / _INDEX)
        names = sorted(set(weight_map.values()))
        absent = [name for name in names if not (folder / name).is_file()]
        if absent:
            raise SourceError(
                f"{folder} is torn: its index names {len(names)} files, of which {', '.join(absent)} are missing; "
                f"save or copy the checkpoint again"
            )
        return [folder / name for name in names], set(weight_map)
    if (folder / _SINGLE).exists():
        return [folder / _SINGLE], set()
    files = sorted(folder.glob("*.safetensors"))
    if [file.name for file in files] == [_ADAPTER]:
        raise SourceError(f"{folder} holds only a LoRA adapter; merge it into its base model and save that")
    if not files:
        raise SourceError(f"{folder} holds no *.safetensors file; save the model with save_pretrained() first")
    return files, set()


def _read_index(path: Path) -> dict[str, str]:
    try:
        weight_map = json.loads(path.read_text())["weight_map"]
    except (KeyError, TypeError, ValueError) as error:
        raise SourceError(f"{path} is not an index of safetensors files ({type(error).__name__}: {error})") from error
    inside = isinstance(weight_map, dict) and all(
        isinstance(name, str) and Path(name).name == name for name in weight_map.values()
    )
    if not inside:
        raise SourceError(f"{path}: weight_map must map tensor names to names of files in the same folder")
    return dict(weight_map)


def _read_header(file: Path) -> list[TensorSpec]:
    specs = []
    with _opened(file) as tensors:
        for name in tensors.offset_keys():
            entry = tensors.get_slice(name)
            dtype = _TORCH_NAMES.get(entry.get_dtype(), "")
            if not hasattr(torch, dtype):
                raise SourceError(
                    f"{file}: tensor {name!r} has dtype {entry.get_dtype()}, which this torch does not have"
                )
            specs.append(TensorSpec(name, dtype, tuple(entry.get_shape())))
    return specs


@contextmanager
def _opened(file: Path) -> Iterator[Any]:
    try:
        with safe_open(file, framework="pt") as tensors:
            yield tensors
    except (OSError, SafetensorError) as error:
        raise SourceError(f"{file} cannot be read ({error}); save or copy the checkpoint again") from error
