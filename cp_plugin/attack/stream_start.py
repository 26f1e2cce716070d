"""What a craft on a stream begins with."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from cp_plugin.attack.perturbation import DTYPES, Perturbation
from cp_plugin.attack.poison_file import Poison
from cp_plugin.attack.row_file import RowFile
from cp_plugin.attack.snapshot import remove_unnamed
from cp_plugin.attack.start import Start, check_init, own_rows, parts_of, taken_up
from cp_plugin.attack.stream_rows import ClassRows, KeyedRows, NewRows
from cp_plugin.config.settings import RANDOM, ZERO, AlternationConfig, UserError
from cp_plugin.data import RawStream, stream_classes
from cp_plugin.data.canonical import stream_size
from cp_plugin.util.processes import share


def raw_at_size(stream: Any, resized_side: int | None, config: AlternationConfig) -> RawStream:
    """Return a stream without its transform, its images at canonical size.

    Args:
        stream: the host's own.
        resized_side: as of `canonical_form`; the first images tell what size they have.
        config: granularity, `image_size`, `fit` and fraction are read from it.

    Raises:
        UserError: the settings ask for what a stream does not tell.
    """
    name = type(stream).__name__
    _check_settings(name, config)
    by_label = config.granularity == "class"
    items = RawStream(stream, None, reads_labels=by_label).first()
    if by_label and all(item.label < 0 for item in items):
        raise UserError(
            f"poison.granularity=class needs labelled images, and none of the first {len(items)} "
            f"samples of {name} holds a label; let its samples hold one whole number each, or "
            "craft a sample poison (+poison=cp)."
        )
    sizes = [(item.image.shape[1], item.image.shape[2]) for item in items]
    size = stream_size(sizes, resized_side, config.image_size)
    return RawStream(stream, size, reads_labels=by_label)


def start_on_stream(
    raw: RawStream,
    config: AlternationConfig,
    seed: int,
    folder: Path,
    resumed: Mapping[str, Any] | None,
) -> Start:
    """Make what finds and makes the rows of delta as the images of a stream come.

    Args:
        raw: the stream without its transform.
        config: granularity, eps, dtype and init are read from it.
        seed: of the start noise.
        folder: where the rows of single images are.
        resumed: an earlier run's state, with `tensors`.

    Raises:
        UserError: a start or a state that does not fit.
    """
    classes = stream_classes(raw.dataset)
    generator = None
    if config.init != ZERO:
        generator = torch.Generator().manual_seed(seed)
        _pass_over_shuffles(raw, classes, generator)
    begun_from = None if config.init in (RANDOM, ZERO) else Poison.load(config.init)
    assert raw.canonical.size is not None
    height, width = raw.canonical.size
    shape = (3, height, width)
    parts = []
    if begun_from is not None:
        check_init(begun_from, raw.canonical.fit, shape)
        parts = parts_of(begun_from)
    by_label = config.granularity == "class"
    rows: NewRows
    if by_label:
        if begun_from is not None:
            begun_from.check_classes(classes or begun_from.classes)
        rows = ClassRows(shape, generator, begun_from, classes)
    else:
        rows = KeyedRows(shape, generator, begun_from)
    if resumed:
        perturbation = taken_up_on_stream(resumed["tensors"], rows, config, folder)
        return Start(perturbation, rows, torch.empty(0, dtype=torch.bool), None)
    remove_unnamed(folder)
    if by_label:
        perturbation = Perturbation.zeros(0, shape, config.eps, config.dtype)
    else:
        dtype = DTYPES[config.dtype]
        file = RowFile.create(own_rows(folder), (0, *shape), dtype)
        perturbation = Perturbation(file, config.eps)
    rows.provide(perturbation)
    return Start(perturbation, rows, torch.empty(0, dtype=torch.bool), None, parts)


def taken_up_on_stream(
    tensors: Mapping[str, Any], rows: NewRows, config: AlternationConfig, folder: Path
) -> Perturbation:
    """Return the perturbation of a state, to go on with, and let rows go on from it.

    Args:
        tensors: as `cp_plugin.attack.snapshot.load` gives them.
        rows: those that a craft with the same settings begins with.
        config: eps is read from it.
        folder: where the rows of single images are.

    Raises:
        UserError: it is the state of another stream or of other settings.
    """
    shape = rows.shape
    needed = {"delta", *rows.tensors()}
    if not needed <= tensors.keys() or tuple(tensors["delta"].shape[1:]) != shape:
        raise UserError(
            f"the state holds {', '.join(sorted(tensors))} with delta of shape "
            f"{tuple(tensors['delta'].shape[1:])} an image, and this stream needs "
            f"{', '.join(sorted(needed))} and {shape}; resume with the stream and the settings "
            "that it was made with, or start anew."
        )
    delta = tensors["delta"]
    if isinstance(rows, KeyedRows) and isinstance(delta, RowFile):
        perturbation = Perturbation.continued(delta, config.eps, own_rows(folder), in_memory=False)
        perturbation.moved = tensors["moved"]
    else:
        perturbation = taken_up(tensors, config, folder)
    rows.resume(dict(tensors), len(perturbation))
    return perturbation


def _check_settings(name: str, config: AlternationConfig) -> None:
    """Check that settings ask for nothing that a stream does not tell.

    Raises:
        UserError: they do.
    """
    if config.granularity == "cluster":
        raise UserError(
            f"poison.granularity=cluster groups all images by the features that one surrogate "
            f"makes of them at one moment, and {name} streams them, so that they are never there "
            "together; use poison.granularity=class or sample, or a map-style data set."
        )
    if config.fraction < 1:
        raise UserError(
            f"poison.fraction={config.fraction:g} picks images among all, and {name} streams them; "
            "poison all of them, or use a map-style data set."
        )
    if config.fit == "cover":
        raise UserError(
            f"poison.fit=cover looks up the shape of each image by its row, and {name} streams "
            "them; use poison.fit=crop, or a map-style data set."
        )
    if config.granularity == "sample" and not RowFile.available:
        raise UserError(
            f"the rows of a stream's images are kept in a file, which this system does not read at "
            f"a place; use poison.granularity=class, or a map-style data set for {name}."
        )
    if share().processes > 1:
        raise UserError(
            f"a poison is crafted on a stream by one process, got {share().processes}: which part "
            f"of {name} each reads is not known; set devices=1, or use a map-style data set."
        )


def _pass_over_shuffles(
    raw: RawStream, classes: tuple[str, ...] | None, generator: torch.Generator
) -> None:
    """Draw what comes first for a map-style data set, where the stream tells as much.

    Its images then start from the same noise: `start` draws a permutation of each class.
    """
    try:
        count = len(raw)
    except TypeError:
        return
    groups = 1 if classes is None else len(classes)
    torch.randperm(max(1, count - groups + 1), generator=generator)
