"""A source over safetensors files: what the folder holds, in file order, and a clear error when it is torn."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from tests.tiny_models import build, saved_tensors
from twinkle_callbacks.errors import SourceError
from twinkle_callbacks.sources import open_source
from twinkle_callbacks.sources.checkpoint import CheckpointSource

TENSORS = {
    "b.weight": torch.randn(4, 3),
    "a.weight": torch.randn(2).to(torch.bfloat16),
    "scalar": torch.tensor(3.5),
    "empty": torch.zeros(0, 4),
    "ids": torch.arange(5),
    "flag": torch.tensor([True, False]),
    "quantized": torch.ones(3).to(torch.float8_e4m3fn),
    "phase": torch.zeros(2, dtype=torch.complex64),
}


def write_sharded(folder: Path) -> dict[str, torch.Tensor]:
    """Two shards and their index, as save_pretrained writes them."""
    model = build("qwen3")
    model.save_pretrained(folder, max_shard_size="500KB")
    assert (folder / "model.safetensors.index.json").exists()
    return dict(open_source(model).stream())


def assert_streams(folder: Path, want: dict[str, torch.Tensor]) -> None:
    source = CheckpointSource(folder)
    got = list(source.stream())
    assert sorted(name for name, _ in got) == sorted(want)
    for name, tensor in got:
        assert tensor.dtype == want[name].dtype
        assert torch.equal(tensor.to(torch.complex64), want[name].to(torch.complex64)), name
    expected = [(name, str(tensor.dtype).removeprefix("torch."), tuple(tensor.shape)) for name, tensor in got]
    assert [(spec.name, spec.dtype, spec.shape) for spec in source.specs()] == expected


def test_single_file_of_every_dtype(tmp_path: Path) -> None:
    save_file(TENSORS, tmp_path / "model.safetensors")
    assert_streams(tmp_path, TENSORS)


def test_saved_model(tmp_path: Path) -> None:
    assert_streams(tmp_path, saved_tensors(build("qwen3_moe"), tmp_path))


def test_shards_with_an_index(tmp_path: Path) -> None:
    assert_streams(tmp_path, write_sharded(tmp_path))


def test_files_of_any_name_without_an_index(tmp_path: Path) -> None:
    save_file({"x": torch.zeros(1)}, tmp_path / "part-b.safetensors")
    save_file({"y": torch.ones(1)}, tmp_path / "part-a.safetensors")
    assert [spec.name for spec in CheckpointSource(tmp_path).specs()] == ["y", "x"]


def test_order_is_that_of_the_bytes_in_the_file(tmp_path: Path) -> None:
    save_file(TENSORS, tmp_path / "model.safetensors")
    length = int.from_bytes((tmp_path / "model.safetensors").read_bytes()[:8], "little")
    header = json.loads((tmp_path / "model.safetensors").read_bytes()[8 : 8 + length])
    by_offset = sorted((name for name in header if name != "__metadata__"), key=lambda n: header[n]["data_offsets"])
    assert [name for name, _ in CheckpointSource(tmp_path).stream()] == by_offset


def test_cast_touches_only_floating_point_tensors_of_16_bits_and_more(tmp_path: Path) -> None:
    save_file(TENSORS, tmp_path / "model.safetensors")
    source = CheckpointSource(tmp_path, dtype=torch.bfloat16)
    kinds = {spec.name: spec.dtype for spec in source.specs()}
    assert kinds == {name: str(tensor.dtype).removeprefix("torch.") for name, tensor in source.stream()}
    assert {name for name, dtype in kinds.items() if dtype == "bfloat16"} == {"a.weight", "b.weight", "scalar", "empty"}


def test_opening_and_specs_read_headers_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_file({"w": torch.zeros(8)}, tmp_path / "model.safetensors")
    monkeypatch.setattr(torch.Tensor, "to", lambda *args: pytest.fail("a tensor was read"))
    assert [spec.shape for spec in CheckpointSource(tmp_path).specs()] == [(8,)]


def test_files_beside_the_index_are_left_out(tmp_path: Path) -> None:
    want = write_sharded(tmp_path)
    save_file({"consolidated": torch.zeros(1)}, tmp_path / "consolidated.safetensors")
    assert_streams(tmp_path, want)


class TestTornFolder:
    def test_missing(self, tmp_path: Path) -> None:
        with pytest.raises(SourceError, match=r"nowhere does not exist; give a folder with safetensors files"):
            CheckpointSource(tmp_path / "nowhere")

    def test_a_file(self, tmp_path: Path) -> None:
        save_file(TENSORS, tmp_path / "model.safetensors")
        with pytest.raises(SourceError, match=r"model.safetensors is a file; give a folder"):
            CheckpointSource(tmp_path / "model.safetensors")

    def test_without_safetensors(self, tmp_path: Path) -> None:
        (tmp_path / "pytorch_model.bin").write_bytes(b"")
        with pytest.raises(SourceError, match=r"holds no \*.safetensors file; save the model with save_pretrained"):
            CheckpointSource(tmp_path)

    def test_adapter_only(self, tmp_path: Path) -> None:
        save_file(TENSORS, tmp_path / "adapter_model.safetensors")
        with pytest.raises(SourceError, match=r"holds only a LoRA adapter; merge it into its base model"):
            CheckpointSource(tmp_path)

    def test_index_names_a_missing_file(self, tmp_path: Path) -> None:
        write_sharded(tmp_path)
        lost = sorted(tmp_path.glob("model-*.safetensors"))[1]
        lost.unlink()
        with pytest.raises(SourceError, match=rf"is torn: its index names . files, of which {lost.name} are missing"):
            CheckpointSource(tmp_path)

    def test_index_names_a_tensor_that_no_file_holds(self, tmp_path: Path) -> None:
        save_file({"x": torch.zeros(1)}, tmp_path / "a.safetensors")
        index = {"weight_map": {"x": "a.safetensors", "y": "a.safetensors"}}
        (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
        with pytest.raises(SourceError, match="the index names 1 tensors that no file holds, such as 'y'"):
            CheckpointSource(tmp_path)

    @pytest.mark.parametrize(
        ("text", "reason"),
        [
            ("{", "is not an index"),
            ("{}", "KeyError: 'weight_map'"),
            ("[]", "TypeError"),
            ('{"weight_map": {"x": "../secret.safetensors"}}', "files in the same folder"),
            ('{"weight_map": ["x"]}', "weight_map must map"),
        ],
    )
    def test_unreadable_index(self, tmp_path: Path, text: str, reason: str) -> None:
        (tmp_path / "model.safetensors.index.json").write_text(text)
        with pytest.raises(SourceError, match=reason):
            CheckpointSource(tmp_path)

    @pytest.mark.parametrize("kept", [4, 60, -1])
    def test_file_that_is_cut_off(self, tmp_path: Path, kept: int) -> None:
        save_file({"w": torch.zeros(64)}, tmp_path / "model.safetensors")
        whole = (tmp_path / "model.safetensors").read_bytes()
        (tmp_path / "model.safetensors").write_bytes(whole[:kept])
        with pytest.raises(
            SourceError, match=r"model.safetensors cannot be read \(.*save or copy the checkpoint again"
        ):
            CheckpointSource(tmp_path)

    def test_no_tensors(self, tmp_path: Path) -> None:
        save_file({}, tmp_path / "model.safetensors")
        with pytest.raises(SourceError, match="hold no tensors"):
            CheckpointSource(tmp_path)

    def test_one_tensor_in_two_files(self, tmp_path: Path) -> None:
        save_file({"x": torch.zeros(1)}, tmp_path / "a.safetensors")
        save_file({"x": torch.zeros(1)}, tmp_path / "b.safetensors")
        with pytest.raises(SourceError, match=r"both a.safetensors and b.safetensors hold 'x'"):
            CheckpointSource(tmp_path)

    def test_file_that_changed_after_opening(self, tmp_path: Path) -> None:
        save_file({"x": torch.zeros(1)}, tmp_path / "model.safetensors")
        source = CheckpointSource(tmp_path)
        save_file({"x": torch.zeros(2)}, tmp_path / "model.safetensors")
        with pytest.raises(SourceError, match="changed since the source was opened"):
            next(source.stream())
