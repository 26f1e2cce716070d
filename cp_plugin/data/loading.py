"""Loaders of images before augmentation, and their batches on a device."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from types import NoneType
from typing import Any

from torch.utils.data import DataLoader

from cp_plugin.config.settings import UserError
from cp_plugin.data import RawDataset, RawStream
from cp_plugin.data.batch import Batch
from cp_plugin.data.slots import rebuilt
from cp_plugin.util.internals import LoaderIterator, forget_iterators
from cp_plugin.util.random_state import RandomState, generator_state

PLAIN = (bool, int, float, str, NoneType)


def moved(batch: Batch, device: Any) -> Batch:
    """Return a batch on a device; which rows it has is asked on the CPU and stays there."""

    def move(value: Any) -> Any:
        return value.to(device, non_blocking=True) if hasattr(value, "to") else value

    images = batch.images.to(device, non_blocking=True)
    return batch._replace(images=images, sample=rebuilt(batch.sample, move))


def check_batched(loader: DataLoader[Any]) -> None:
    """Check that a loader makes batches by itself.

    Raises:
        UserError: it hands out what the data set returns, one sample or a batch that the data set
            makes.
    """
    if loader.batch_sampler is None:
        raise UserError(
            f"the {type(loader).__name__} has batch_size=None and no batch_sampler, so that the "
            "data set makes the batches, and no row of it is known to belong to an image; give the "
            "loader a batch_size or a batch_sampler, and let the data set return one image a row."
        )


def batches_of(loader: DataLoader[Any]) -> float:
    """Return how many batches an epoch has; infinity where a stream does not tell its length."""
    try:
        return len(loader)
    except TypeError:
        return math.inf


def batch_size_of(loader: DataLoader[Any]) -> int:
    """Return how many images a batch has at most, as far as the loader or its sampler says."""
    size = loader.batch_size or getattr(loader.batch_sampler, "batch_size", None)
    return int(size) if size else -(-len(loader.dataset) // max(1, len(loader)))  # type: ignore[arg-type]


def unwrapped(loader: Any) -> Any:
    """Return the loader inside one that a framework has wrapped (Accelerate's, Fabric's).

    Such a wrapper moves batches to a device and counts them; the loader in it has data set, sampler
    and collate function.
    """
    held = getattr(loader, "__dict__", {})
    inside = [value for value in held.values() if isinstance(value, DataLoader)]
    return unwrapped(inside[0]) if len(inside) == 1 else loader


def renew_iterators(loader: DataLoader[Any]) -> None:
    """Remake the iterators that a loader keeps: they hold the data set that they began with."""
    forget_iterators(loader)
    kept = [name for name, value in vars(loader).items() if isinstance(value, LoaderIterator)]
    for name in kept:
        vars(loader)[name] = DataLoader.__iter__(loader)


class LoaderStart:
    """The random state in which a loader makes its first iterator, to make that one again.

    An iterator draws the seed of its workers when it is made, and what workers fetch in advance has
    its sampler draw the order. Made again from here it draws the same, so that a run whose data set
    was exchanged sees the images in the order in which it would have seen them.
    """

    def __init__(self, loader: Any) -> None:
        """Take the state; call before the iterator is made.

        Args:
            loader: the loader; of anything else the global generators alone are taken.
        """
        self._random = RandomState()
        self._own = [
            put_back for held in samplers_and_parts(loader) if (put_back := generator_state(held))
        ]
        self._counters = Counters(samplers(loader))
        self._counts = self._counters.now()

    def replay(self, make: Callable[[], None]) -> None:
        """Call what makes the iterator, from the state of the first; the global state stays."""
        now = RandomState()
        self._random.restore()
        for put_back in self._own:
            put_back()
        self._counters.restore(self._counts)
        try:
            make()
        finally:
            now.restore()


def samplers(loader: Any) -> Iterator[Any]:
    """Yield the samplers of a loader, and those that they draw from."""
    for name in ("sampler", "batch_sampler"):
        held = getattr(loader, "__dict__", {}).get(name)
        if held is not None:
            yield held
            yield from samplers(held)


def samplers_and_parts(loader: Any) -> Iterator[Any]:
    """Yield what a loader and its samplers hold, the samplers among it."""
    yield from getattr(loader, "__dict__", {}).values()
    for sampler in samplers(loader):
        yield from getattr(sampler, "__dict__", {}).values()


class Counters:
    """Plain values of samplers: one that counts its iterations draws each order from the count.

    A sampler with `set_epoch` is told its epoch and is left out. So are those of torch, which count
    nothing: a run may go on with another batch size, and in another number of processes.
    """

    def __init__(self, owners: Iterable[Any]) -> None:
        own = {id(one): one for one in owners if hasattr(one, "__dict__")}
        self._owners = [
            one
            for one in own.values()
            if not hasattr(one, "set_epoch") and type(one).__module__.partition(".")[0] != "torch"
        ]
        self._first = self.now()
        self._moving: list[set[str]] = [set() for _ in self._owners]
        """Names of values that have been others than at first."""

    def moving(self, values: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
        """Return those values of `now`, of today or earlier, that a checkpoint needs.

        What a sampler was made with and keeps, such as the number of its process, is another in
        another process.
        """
        for held in (values, self.now()):
            for names, first, those in zip(self._moving, self._first, held, strict=False):
                names.update(name for name, value in those.items() if first.get(name) != value)
        return [
            {name: value for name, value in those.items() if name in names}
            for names, those in zip(self._moving, values, strict=False)
        ]

    def now(self) -> list[dict[str, Any]]:
        """Return the values of each sampler by name: numbers, text and None."""
        return [
            {name: value for name, value in vars(one).items() if type(value) in PLAIN}
            for one in self._owners
        ]

    def restore(self, values: Iterable[Mapping[str, Any]]) -> None:
        """Put the values back that `now` returned."""
        for one, held in zip(self._owners, values, strict=False):
            vars(one).update(held)


def raw_loader(loader: DataLoader[Any], raw: RawDataset | RawStream) -> DataLoader[Any]:
    """Return a copy of a loader that brings batches of its raw data set."""
    own = copy.copy(loader)
    object.__setattr__(own, "dataset", raw)
    own.collate_fn = Collate(raw, loader.collate_fn)
    renew_iterators(own)
    return own


class Collate:
    """`RawDataset.collate` with the host's own collate function; a class, for the workers' sake."""

    def __init__(self, raw: RawDataset | RawStream, host_collate: Callable[[Any], Any]) -> None:
        self._raw, self._host_collate = raw, host_collate

    def __call__(self, items: Any) -> Batch:
        """Collate the items of raw data sets."""
        return self._raw.collate(items, self._host_collate)
