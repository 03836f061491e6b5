"""Digests of tensors on a GPU that are computed again where they lie, with what they hold then."""

from __future__ import annotations

import torch

from twinkle_callbacks.buckets.device_digest import DeviceStreamDigest, tensor_digest

DEVICE = torch.device("cuda", 0)
NBYTES = [1, 8, 1000, 4 << 20]


def tensors(offset: int = 0) -> list[torch.Tensor]:
    values = torch.Generator(DEVICE).manual_seed(1)
    flat = [torch.randint(0, 256, (n + offset,), dtype=torch.uint8, device=DEVICE, generator=values) for n in NBYTES]
    return [each[offset:] for each in flat]


def test_lasting_tensors_that_are_added_again_count_with_what_they_hold_then() -> None:
    lasting = tensors()
    names = [str(n) for n in NBYTES]
    digest = DeviceStreamDigest(DEVICE)
    before = digest.add_lasting(names, lasting)
    assert digest.values == [tensor_digest(each) for each in lasting]
    old = digest.values
    for each in lasting:
        each.add_(1)
    again = DeviceStreamDigest(DEVICE)
    again.add_again(before)
    assert again.names == names
    assert again.values == [tensor_digest(each) for each in lasting]
    assert again.values != old


def test_tensors_at_odd_addresses_have_to_be_told_of_anew() -> None:
    odd = tensors(offset=2)
    digest = DeviceStreamDigest(DEVICE)
    assert digest.add_lasting(["a"] * len(odd), odd) is None
    assert digest.values == [tensor_digest(each.clone()) for each in odd]
