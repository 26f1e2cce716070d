"""The order in which a loader brings its images, taken up again in the midst of an epoch.

An order is drawn as an epoch begins, from the global generators or from those of loader and
sampler. What they were then, and how many batches have been used since, is enough to draw it again;
what workers had fetched in advance is drawn a second time. Of several processes that train together
all draw theirs again or none does; there may be another number of them.
"""

from __future__ import annotations

import copy
import itertools
import logging
import zlib
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch.utils.data import DataLoader

from cp_plugin.config.settings import UserError
from cp_plugin.data.loading import Counters, renew_iterators, samplers, samplers_and_parts
from cp_plugin.util.processes import share, total
from cp_plugin.util.random_state import RandomState, generator_state

log = logging.getLogger("cp_plugin")


class Order:
    """The batch sampler of a loader, which knows how the present epoch began.

    It stands in the place of the loader's own and has its attributes.
    """

    def __init__(self, loader: DataLoader[Any]) -> None:
        """Take the loader's batch sampler, and the generators that it and the loader hold."""
        own: Any = loader.batch_sampler
        self.inner: Any = own.inner if isinstance(own, Order) else own
        parts = list(samplers_and_parts(loader))
        parts += [] if self.inner is own else samplers_and_parts(self.inner)
        kinds = {id(part): part for part in parts if generator_state(part) is not None}
        self._generators: list[Any] = list(kinds.values())
        # The loader's own are replaced by this object, which its own sampler's are behind.
        self._counters = Counters([*samplers(loader), self.inner, *samplers(self.inner)])
        epochs = {id(part): part for part in parts if callable(getattr(part, "set_epoch", None))}
        self._with_epochs: list[Any] = list(epochs.values())
        self._length = _length(self.inner)
        """Batches of an epoch; an iteration that goes on after them is not taken up again."""
        self._begun: dict[str, Any] | None = None
        self._sums: list[int] = []
        """Checksums of this process's rows in the first batch of the epoch, in the first two, …"""
        self._resumed: dict[str, Any] | None = None

    def __getattr__(self, name: str) -> Any:
        if "inner" not in self.__dict__:  # a copy in the making
            raise AttributeError(name)
        return getattr(self.inner, name)

    def __len__(self) -> int:
        return len(self.inner)

    def __iter__(self) -> Iterator[Any]:
        """Yield the rows of each batch of an epoch, or of what is left of it."""
        resumed, self._resumed = self._resumed, None
        left = None if resumed is None else self._replayed(resumed)
        if left is None:
            self._begun, self._sums = self._now(), []
            left = iter(self.inner)
        for rows in left:
            if len(self._sums) <= self._length:
                self._sums.append(_sum(rows, self._sums))
            yield rows

    def state(self, used: int) -> dict[str, Any] | None:
        """Return what brings the order back after so many batches of the epoch; plain values.

        None: it cannot be brought back. Processes that train together all ask for it.
        """
        if self._begun is None or not 0 < used <= len(self._sums) <= self._length:
            return None
        counts = self._counters.moving(self._begun.get("counts", []))
        return {**self._begun, "counts": counts, "used": used, "sum": total(self._sums[used - 1])}

    def restore(self, state: dict[str, Any]) -> None:
        """Go on after the batches that a state had used when it is iterated next."""
        self._resumed = state

    def sources(self) -> dict[str, Any]:
        """Return what the loader itself draws orders from, for a checkpoint; plain values.

        `generators`: states of its generators, None for one that is not torch's; `counts`: plain
        values of its samplers that have moved, by name.
        """
        here = self.sources_here()
        return {**here, "counts": self._counters.moving(here["counts"])}

    def sources_here(self) -> dict[str, Any]:
        """Return the same with all values of the samplers, for this process alone."""
        states = [one.get_state() if _is_torch(one) else None for one in self._generators]
        return {"generators": states, "counts": self._counters.now()}

    def restore_sources(self, state: dict[str, Any]) -> None:
        """Put back what `sources` or `sources_here` returned, which a larger state may hold."""
        for one, own in zip(self._generators, state["generators"], strict=False):
            if own is not None:
                one.set_state(own)
        self._counters.restore(state.get("counts", []))  # older checkpoints have none

    def _now(self) -> dict[str, Any]:
        epochs = [getattr(one, "epoch", None) for one in self._with_epochs]
        return {"random": RandomState().plain(), "epochs": epochs, **self.sources_here()}

    def _replayed(self, state: dict[str, Any]) -> Iterator[Any] | None:
        """Return what is left of an epoch, None where it cannot be drawn as it was."""
        now, own = RandomState(), self._now()
        RandomState.of(state["random"]).restore()
        self.restore_sources(state)
        self._set_epochs(state["epochs"])
        try:
            sums: list[int] = []
            left: Iterator[Any] = iter(self.inner)
            for rows in itertools.islice(left, state["used"]):
                sums.append(_sum(rows, sums))
            if total(sums[-1] if sums else 0) == state["sum"]:
                self._begun, self._sums = {key: state[key] for key in own if key in state}, sums
                return left
        finally:
            now.restore()
            self.restore_sources(own)
            self._set_epochs(own["epochs"])
        log.warning(
            "the order of the images in the interrupted epoch cannot be drawn again, since %s "
            "depends on more than generators of torch and plain values of samplers: its batches "
            "are drawn anew",
            type(self.inner).__name__,
        )
        return None

    def _set_epochs(self, epochs: Iterable[int | None]) -> None:
        for one, epoch in zip(self._with_epochs, epochs, strict=False):
            if epoch is not None:
                one.set_epoch(epoch)


class Endless:
    """The batches of a loader, epoch after epoch, apart from any other use of the loader."""

    def __init__(self, loader: DataLoader[Any]) -> None:
        self._loader = copy.copy(loader)  # persistent workers serve one iteration at a time
        self._order = Order(loader)
        vars(self._loader)["batch_sampler"] = self._order
        self._iterator: Iterator[Any] | None = None
        self._used = 0

    def __iter__(self) -> Iterator[Any]:
        return self

    def __next__(self) -> Any:
        if self._iterator is None:
            self._begin()
        assert self._iterator is not None
        try:
            batch = next(self._iterator)
        except StopIteration:
            self._begin()
            batch = next(self._iterator, None)
            if batch is None:
                raise UserError(
                    f"{type(self._loader.dataset).__name__} brought no batch when it was read "
                    "again; let its __iter__ begin anew whenever it is called."
                ) from None
        self._used += 1
        return batch

    def state(self) -> dict[str, Any] | None:
        """Return where it is; None: the next batch begins an epoch, or its order is not known."""
        return self._order.state(self._used)

    def restore(self, state: dict[str, Any]) -> None:
        """Go on where a state was; draws nothing from the global generators."""
        random, own = RandomState(), self._order.sources_here()
        self._order.restore(state)
        self._begin()
        self._used = state["used"]
        assert self._iterator is not None
        random.restore()
        self._order.restore_sources(own)

    def _begin(self) -> None:
        if self._iterator is None:
            renew_iterators(self._loader)
        self._iterator, self._used = iter(self._loader), 0


def _length(sampler: Any) -> int:
    """Return the batches of an epoch, 0 where they are not known, as those of a stream."""
    try:
        return len(sampler)
    except TypeError:
        return 0


def _sum(rows: Any, before: list[int]) -> int:
    """Return the checksum of a batch and those before it; over all processes these add up.

    Each image counts with its batch and its place among those of all processes.
    """
    own = share()
    rows = list(rows) if isinstance(rows, Iterable) else [rows]
    places = range(own.rank, own.rank + len(rows) * own.processes, own.processes)
    found = (f"{len(before)} {place} {row!r}" for place, row in zip(places, rows, strict=True))
    return sum((zlib.crc32(one.encode()) for one in found), before[-1] if before else 0)


def _is_torch(generator: Any) -> bool:
    return isinstance(generator, torch.Generator)
