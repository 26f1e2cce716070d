"""Canonical images read once, where they fit into memory and do not change from reading to reading.

A data set that draws random numbers as it reads an image, or returns another sample each time, goes
on being read at every step: its pixels are its own business. So is one that has an image which
cannot be read or has a size of its own, whose error belongs where a batch brings it.
"""

from __future__ import annotations

import logging
import pickle
import random
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from cp_plugin.config.settings import CacheMode, UserError
from cp_plugin.data import wrappers
from cp_plugin.data.cache import Cache
from cp_plugin.data.raw import RawDataset
from cp_plugin.data.raw_images import Item
from cp_plugin.data.raw_stream import RawStream
from cp_plugin.util.memory import available_bytes
from cp_plugin.util.processes import share
from cp_plugin.util.random_state import RandomState

log = logging.getLogger("cp_plugin")

SHARE = 4
"""With `auto` images are kept that take up to this part of the memory that is available."""
LOOKED_AT = 8
"""Rows that are read twice to see whether they change."""
BATCH = 64
"""Rows that a worker process reads at a time."""
GENERATORS = (torch.Generator, np.random.Generator, np.random.RandomState, random.Random)


def read_once(
    raw: RawDataset | RawStream, mode: CacheMode = "auto", loader: DataLoader[Any] | None = None
) -> None:
    """Read all images of a data set and keep them as its `cache`, where that is possible.

    Args:
        raw: the data set; its samples and their order stay the same. A stream is not kept.
        mode: `auto`: where they take at most a quarter of the available memory; `true`: however
            large they are; `false`: not.
        loader: whose worker processes are used for reading; None: this process reads.
    """
    if mode == "false" or isinstance(raw, RawStream) or raw.cache is not None:
        return
    reason = _changing(raw)
    if reason is not None:
        log.info("images are read at every step, since %s", reason)
        return
    item = raw[0]
    bytes_ = len(raw) * (item.image.nbytes + 8 + _pickled(item.sample))
    height, width = item.image.shape[1:]
    told = f"{len(raw):,} of {height} x {width} pixels, {_readable(bytes_)}"
    free = available_bytes() // share().processes  # all may be here
    if mode == "auto" and bytes_ > free // SHARE:
        log.info(
            "images are decoded at every step: %s, more than a quarter of the %s of memory that "
            "is available; data.cache=true keeps them all the same",
            told,
            _readable(free),
        )
        return
    try:
        raw.cache = _read(raw, loader)
    except UserError as error:
        log.info("images are read at every step, since not all can be kept: %s", error)
        return
    log.info("images are read once and kept in memory: %s (data.cache)", told)


def _changing(raw: RawDataset) -> str | None:
    """Say why a data set cannot be read once; None where nothing speaks against it."""
    name = type(raw.dataset).__name__
    if any(_has_generator(dataset) for dataset in _all_inside(raw.dataset)):
        return f"{name} has a random generator of its own"
    rows = torch.linspace(0, len(raw) - 1, min(len(raw), LOOKED_AT)).round().long().tolist()
    state = RandomState()
    try:
        same = all(_same(raw[row], raw[row]) for row in rows)
        if state.was_drawn_from():
            return f"{name} draws random numbers as it reads one"
    except UserError as error:
        return str(error)
    finally:
        state.restore()
    return None if same else f"{name} returns another sample each time"


def _same(first: Item, second: Item) -> bool:
    try:
        samples = pickle.dumps(first.sample) == pickle.dumps(second.sample)
    except (pickle.PicklingError, TypeError, AttributeError):
        return False
    return first.key == second.key and samples


def _pickled(sample: Any) -> int:
    return len(pickle.dumps(sample))


def _read(raw: RawDataset, loader: DataLoader[Any] | None) -> Cache:
    """Read every row.

    Raises:
        UserError: an image cannot be read, has a size of its own, or random numbers were drawn.
    """
    count = len(raw)
    images = torch.empty((count, *raw[0].image.shape), dtype=torch.uint8)
    keys = torch.empty(count, dtype=torch.int64)
    samples: list[Any] = []
    state = RandomState()
    try:
        for part in _parts(raw, loader):
            rows = slice(len(samples), len(samples) + len(part.samples))
            if part.images.shape[1:] != images.shape[1:]:
                raise UserError(f"row {rows.start} and the following have another size.")
            images[rows], keys[rows] = part.images, part.keys
            samples += part.samples
        if state.was_drawn_from():
            raise UserError(f"{type(raw.dataset).__name__} draws random numbers as it reads.")
    finally:
        state.restore()
    return Cache(images, keys, samples)


class _Part(NamedTuple):
    images: Tensor
    keys: Tensor
    samples: list[Any]


def _parts(raw: RawDataset, loader: DataLoader[Any] | None) -> Iterator[_Part]:
    if loader is None or loader.num_workers == 0:
        for start in range(0, len(raw), BATCH):
            yield _part([raw[row] for row in range(start, min(start + BATCH, len(raw)))])
        return
    yield from DataLoader(
        _Rows(raw),
        BATCH,
        num_workers=loader.num_workers,
        collate_fn=_part,
        worker_init_fn=loader.worker_init_fn,
        multiprocessing_context=loader.multiprocessing_context,
        generator=torch.Generator(),  # the run's own draws nothing for it
    )


class _Rows(Dataset[Item]):
    """The rows of a raw data set one by one, for worker processes."""

    def __init__(self, raw: RawDataset) -> None:
        self._raw = raw

    def __len__(self) -> int:
        return len(self._raw)

    def __getitem__(self, row: int) -> Item:
        return self._raw[row]


def _part(items: Sequence[Item]) -> _Part:
    if len({item.image.shape for item in items}) > 1:
        raise UserError("images of different sizes.")
    return _Part(
        torch.stack([item.image for item in items]),
        torch.tensor([item.key for item in items], dtype=torch.int64),
        [item.sample for item in items],
    )


def _all_inside(dataset: Any) -> Iterator[Any]:
    yield dataset
    for child in wrappers.inside(dataset):
        yield from _all_inside(child)


def _has_generator(dataset: Any) -> bool:
    return any(isinstance(value, GENERATORS) for value in wrappers.attributes(dataset).values())


def _readable(bytes_: int) -> str:
    return f"{bytes_ / 1e9:,.1f} GB" if bytes_ >= 1e9 else f"{bytes_ / 1e6:,.1f} MB"
