"""Recorded copies: the loader's copies into the live model, noted once and repeated at every later commit.

On a GPU, all that vLLM's loader does to most layers is copy slices of the given tensors into slices of the registered
ones. One load is watched at the level of torch's operators. An operator that touches either and is not such
a copy makes the recording fail, so nothing is derived from weights unseen, and no decision hangs on a value.

Layers that may hold more than copies are left to the loader at every commit, with the tensors that go to them: the rest
of a record (see `layers.py` for which these are, `routes.py` for what goes to them).

    record     load once more, watched; spoil what was written, replay, and compare digests with the normal commit's
    fits       the same tensors, into the same memory?                          before each replay
    replay     the copies; where some overlap, in the loader's order, so that they end as they did; then the rest
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import torch
import xxhash
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from twinkle_callbacks.buckets.digest import first_few
from twinkle_callbacks.buckets.packing import as_bytes, memory
from twinkle_callbacks.errors import EngineError
from twinkle_callbacks.worker.copies import Copy, Fill, Tensors, Writes, span

Digest = Callable[[torch.Tensor], int]

_WORDS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


class NotRecordedError(EngineError):
    """A load is more than a set of copies. Told in the log; commits go through the loader then."""


def host_digest(tensor: torch.Tensor) -> int:
    """XXH3-64 of a tensor's bytes, computed in host memory."""
    return xxhash.xxh3_64_intdigest(memory(as_bytes(tensor.cpu())))


class Rest(NamedTuple):
    """What a commit leaves to the loader.

    Attributes:
        names: of the tensors that are loaded.
        layers: that are reloaded, with all layers inside them.
        filled: titles of the parameters, of whatever layer, that a whole set of tensors fills entirely.
        known: titles of what the model has when it is made; reloaded layers have others through processing alone.
        reload: loads these tensors and reloads these layers, and leaves their tensors where they were.
        reason: why, for the log.
    """

    names: Sequence[str]
    layers: Sequence[torch.nn.Module]
    filled: frozenset[str]
    known: frozenset[str]
    reload: Callable[[Sequence[tuple[str, torch.Tensor]], Sequence[torch.nn.Module]], None]
    reason: str

    def replay(self, tensors: Tensors) -> None:
        self.reload([(name, tensors[name]) for name in self.names], self.layers)

    def made(self, places: Iterable[Place]) -> list[torch.Tensor]:
        """Those of the model's tensors that only processing has made, and a reload has to make anew."""
        reloaded = self.storages()
        others = [place.home for place in places if place.title not in self.known and place.home.numel()]
        return [home for home in others if _storage(home) in reloaded]

    def storages(self) -> set[int]:
        """Those of all tensors of the layers."""
        return {_storage(place.home) for layer in self.layers for place in places_in(layer) if place.home.numel()}


class RecordedCopies:
    """What the loader copies into one model from tensors of certain names and layouts. Made by `record`."""

    def __init__(self, places: list[Place], layouts: Layouts, writes: Writes, rest: Rest | None) -> None:
        self._places, self._layouts, self._writes, self._rest = places, layouts, writes, rest

    @classmethod
    def record(
        cls,
        model: Any,
        tensors: Tensors,
        digest: Digest = host_digest,
        layouts: Layouts | None = None,
        rest: Rest | None = None,
    ) -> RecordedCopies:
        """Loads `tensors` again, right after a commit of the same through the loader.

        The record returned has proved itself: its replay restored, bit for bit, what the commit had left. That goes for
        what is registered with the model; what else processing makes is only as fresh as vLLM's reload leaves it.

        Args:
            model: loads as vLLM's models do.
            tensors: what was committed.
            digest: of one tensor, wherever it lives, sensitive to the order of its elements.
            layouts: of the tensors, if known.
            rest: what is not recorded, but left to the loader at each replay.

        Raises:
            NotRecordedError: the load is more than copies, or their replay gives something else.
            Exception: whatever the loader raises. After either, all tensors are in place, but must be loaded again.
        """
        places = list(places_in(model))
        expected = _digests(places, digest)
        _check_apart(places, tensors)
        loaded = set() if rest is None else set(rest.names)
        copied = {name: tensor for name, tensor in tensors.items() if name not in loaded}
        made = [] if rest is None else [(home, home.clone()) for home in rest.made(places)]
        try:
            with torch.no_grad(), _Recorder(places, copied, set() if rest is None else rest.storages()) as recorder:
                model.load_weights(copied.items())
            if not recorder.writes:
                raise NotRecordedError("the loader wrote nothing")
            if rest is not None:
                recorder.check_all_copied()
            _check_same(places, list(places_in(model)))
            _compare("a load without a reload leaves other values", expected, _digests(places, digest))
            layouts = layouts_of(tensors) if layouts is None else layouts
            record = cls(places, layouts, Writes(recorder.writes, copied), rest)
            record._spoil()
            record.replay(tensors)
            _check_same(places, list(places_in(model)))
            _compare("repeating the copies leaves other values", expected, _digests(places, digest))
        except BaseException:
            for place in places:
                place.put_back()
            for home, values in made:
                home.copy_(values)
            raise
        return record

    @property
    def is_whole(self) -> bool:
        """Whether nothing is left to the loader."""
        return self._rest is None

    def fits(self, layouts: Layouts) -> str:
        """Why tensors of these layouts cannot be replayed into this model; empty if they can."""
        if layouts is not self._layouts and layouts != self._layouts:  # the former takes no time
            names = self._layouts.keys() | layouts.keys()
            other = sorted(name for name in names if self._layouts.get(name) != layouts.get(name))
            return f"other names, shapes, dtypes, strides or devices: {first_few(other)}"
        moved = [place.title for place in self._places if not place.is_unchanged()]
        return f"moved or replaced in the model: {first_few(moved)}" if moved else ""

    def replay(self, tensors: Tensors) -> None:
        """Writes tensors that fit, and waits until they are there.

        Raises:
            Exception: whatever the loader raises at the rest; the copies are done then.
        """
        self._writes.replay(tensors)
        if self._rest is not None:
            self._rest.replay(tensors)

    def __str__(self) -> str:
        return str(self._writes) if self._rest is None else f"{self._writes}; {self._rest.reason}"

    def _spoil(self) -> None:
        """Overwrites what a replay has to bring back, that of the rest too."""
        spoiled = list(self._writes.targets)
        if self._rest is not None:
            spoiled += [place.home for place in self._places if place.title in self._rest.filled and place.home.numel()]
            spoiled += self._rest.made(self._places)
        for target in spoiled:
            if target.element_size() in _WORDS:
                target.view(_WORDS[target.element_size()]).fill_(-1)


class Place(NamedTuple):
    """Where a tensor is registered: under a name in the parameters or buffers of a layer, at an address."""

    title: str
    registry: dict[str, Any]
    name: str
    tensor: torch.Tensor
    home: torch.Tensor  # its memory, should the tensor be given other memory
    address: int

    def is_unchanged(self) -> bool:
        return self.registry.get(self.name) is self.tensor and self.tensor.data_ptr() == self.address

    def put_back(self) -> None:
        self.registry[self.name] = self.tensor
        if self.tensor.data_ptr() != self.address:
            self.tensor.data = self.home


def places_in(model: torch.nn.Module) -> Iterator[Place]:
    """Every parameter and buffer of a model, under each of its titles."""
    for prefix, module in model.named_modules():
        for registry in (module._parameters, module._buffers):
            for name, tensor in registry.items():
                if tensor is not None:
                    title = f"{prefix}.{name}" if prefix else name
                    yield Place(title, registry, name, tensor, tensor.detach(), tensor.data_ptr())


def _check_apart(places: list[Place], tensors: Tensors) -> None:
    if {_storage(p.home) for p in places if p.home.numel()} & {_storage(t) for t in tensors.values() if t.numel()}:
        raise NotRecordedError("tensors to load lie in the memory of the model")


def _check_same(before: list[Place], after: list[Place]) -> None:
    known = {place.title for place in before}
    other = [p.title for p in before if not p.is_unchanged()] + [p.title for p in after if p.title not in known]
    if other:
        raise NotRecordedError(f"the loader replaced or added tensors: {first_few(other)}")


def _digests(places: list[Place], digest: Digest) -> dict[str, int]:
    once = {id(place.tensor): place for place in places if place.home.numel()}  # tied ones are in several places
    return {place.title: digest(place.home) for place in once.values()}


def _compare(what: str, expected: dict[str, int], found: dict[str, int]) -> None:
    differing = [title for title, value in expected.items() if found[title] != value]
    if differing:
        raise NotRecordedError(f"{what} in {len(differing)} of {len(expected)} tensors: {first_few(differing)}")


Layouts = dict[str, tuple[torch.dtype, torch.Size, tuple[int, ...], torch.device]]


def layouts_of(tensors: Tensors) -> Layouts:
    """What must stay the same for a replay, apart from the values."""
    return {name: (tensor.dtype, tensor.shape, tensor.stride(), tensor.device) for name, tensor in tensors.items()}


class _Recorder(TorchDispatchMode):  # type: ignore[no-untyped-call]  # torch leaves its base untyped
    """Notes the copies from given tensors into registered ones, and refuses all else that touches either."""

    def __init__(self, places: list[Place], tensors: Tensors, reloaded: set[int]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # as above
        self.writes: list[Copy | Fill] = []
        self._reloaded = reloaded
        self._registered = {_storage(place.home) for place in places if place.home.numel()}
        self._tensors = tensors
        # They may lie in one storage, as slices of a bucket do: a view belongs to the tensor within whose bytes it is.
        self._spans = sorted((*span(tensor), name) for name, tensor in tensors.items() if tensor.numel())
        self._given = {_storage(tensor) for tensor in tensors.values() if tensor.numel()}
        for (_, end, name), (start, _, other) in pairwise(self._spans):
            if start < end:
                raise NotRecordedError(f"{name} and {other} share memory")

    def check_all_copied(self) -> None:
        """Raises NotRecordedError unless something of each tensor was copied."""
        untouched = self._tensors.keys() - {write.source for write in self.writes if isinstance(write, Copy)}
        if untouched:
            raise NotRecordedError(f"the loader took nothing of {first_few(sorted(untouched))}")

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        aten = torch.ops.aten
        operands = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor) and leaf.numel()]
        touched = {_storage(tensor) for tensor in operands} & (self._given | self._registered)
        if touched and func._schema.is_mutable:
            if isinstance(args[0], torch.Tensor) and _storage(args[0]) in self._reloaded:
                raise NotRecordedError("the loader writes into a layer that is reloaded, with tensors for others")
            if func is aten.copy_.default:
                self.writes.append(self._copy(args[0], args[1]))
            elif func in (aten.fill_.Scalar, aten.zero_.default) and _storage(args[0]) in self._registered:
                self.writes.append(Fill(_plain(args[0]), args[1] if func is aten.fill_.Scalar else 0))
            else:
                raise NotRecordedError(f"the loader changes weights with {func}")
        result = func(*args, **(kwargs or {}))
        if touched and not func._schema.is_mutable and not _are_views(tree_leaves(result), touched):
            raise NotRecordedError(f"the loader computes with the values of weights: {func}")
        return result

    def _copy(self, target: torch.Tensor, source: torch.Tensor) -> Copy:
        start, end = span(source)
        within = bisect_right(self._spans, start, key=lambda each: each[0]) - 1
        if within < 0 or end > self._spans[within][1]:
            raise NotRecordedError("the loader copies something that it was not given")
        name = self._spans[within][2]
        if _storage(target) not in self._registered:
            raise NotRecordedError(f"the loader copies {name} to where no parameter or buffer is")
        given = self._tensors[name]
        if source.dtype != given.dtype or source.device != given.device or source.device != target.device:
            raise NotRecordedError(f"the loader copies {name} as {source.dtype} from {source.device}")
        offset = (start - given.data_ptr()) // source.element_size()
        whole = (source.shape, source.stride(), offset) == (given.shape, given.stride(), 0)
        return Copy(_plain(target), name, None if whole else (source.shape, source.stride(), offset))


def _are_views(results: list[Any], storages: set[int]) -> bool:
    tensors = [leaf for leaf in results if isinstance(leaf, torch.Tensor)]
    return len(tensors) == len(results) > 0 and all(_storage(t) in storages for t in tensors if t.numel())


def _plain(target: torch.Tensor) -> torch.Tensor:
    if target.element_size() not in _WORDS:
        raise NotRecordedError(f"the model has a tensor of {target.dtype}, which cannot be verified")
    return target.detach()


def _storage(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage().data_ptr()
