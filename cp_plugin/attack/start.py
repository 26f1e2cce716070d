"""What a craft begins with: rows of delta, new, resumed or from a poison file, and their images."""

from __future__ import annotations

import json
import math
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cp_plugin.attack.perturbation import DTYPES, Perturbation, new_rows
from cp_plugin.attack.poison_file import Poison
from cp_plugin.attack.row_file import RowFile
from cp_plugin.attack.rows import Rows
from cp_plugin.attack.snapshot import remove_unnamed
from cp_plugin.config.settings import RANDOM, ZERO, AlternationConfig, CraftConfig, Fit, UserError
from cp_plugin.data import RawDataset, names_or_numbers
from cp_plugin.data.subset import keys_of_part
from cp_plugin.util.memory import available_bytes
from cp_plugin.util.processes import share

LARGEST_IN_MEMORY = 8 << 30
"""Bytes; a larger perturbation is in a file, as is one that takes more than half of what memory is
available."""


@dataclass
class Start:
    """What a craft begins with."""

    perturbation: Perturbation
    rows: Rows
    chosen: Tensor
    """Which images carry the poison, bool (N)."""
    images: int | None = None
    """Different images of the data set that could carry a poison; None: not counted."""
    parts: list[dict[str, Any]] = field(default_factory=list)
    """Method, model and noise steps of each surrogate that the perturbation has been through."""


def start(
    raw: RawDataset,
    labels: Tensor | None,
    config: AlternationConfig,
    seed: int,
    folder: Path,
    resumed: Mapping[str, Any] | None,
) -> Start:
    """Make the rows of delta for the images of a data set.

    Args:
        raw: the data set without its transform.
        labels: int64 (N), negative where unlabelled; None: there are none.
        config: granularity, fraction, eps, dtype and init are read from it.
        seed: of the start noise.
        folder: where a perturbation too large for memory is.
        resumed: an earlier run's state, with `tensors`.

    Raises:
        UserError: class granularity without labels, a start or a state that does not fit.
    """
    generator = torch.Generator().manual_seed(seed)
    _pass_over_shuffles(labels, len(raw), generator)
    chosen, keys, images = _chosen(raw, labels, config)
    names = names_or_numbers(raw.dataset)
    if config.granularity == "cluster":
        assert isinstance(config, CraftConfig)
        _check_clusters(config.clusters, int(chosen.sum()))
        rows, count = Rows(torch.full((len(raw),), -1)), config.clusters
    elif config.granularity == "class":
        if labels is None or names is None or not bool((labels >= 0).any()):
            raise UserError(
                "poison.granularity=class needs labelled images and this data set has no "
                "labels; use labelled data or a sample poison (+poison=cp)."
            )
        rows, count = Rows.of_classes(labels, chosen), len(names)
    else:
        rows, count = Rows.of_samples(chosen), int(chosen.sum())
    if resumed:
        tensors = resumed["tensors"]
        _check_shapes(tensors, (count, *raw[0].image.shape), rows.keys is not None)
        _check_keys(tensors, rows, keys, count, config)
        return Start(taken_up(tensors, config, folder), rows, chosen, images)
    if share().rank == 0:
        remove_unnamed(folder)
    perturbation = _noise(raw, count, config, folder, generator)
    parts: list[dict[str, Any]] = []
    if config.init not in (RANDOM, ZERO):
        poison = Poison.load(config.init)
        parts = parts_of(poison)
        _take_over(poison, raw, labels, perturbation, rows)
    return Start(perturbation, rows, chosen, images, parts)


def _check_clusters(clusters: int, images: int) -> None:
    """Check that there are images enough.

    Raises:
        UserError: there are not.
    """
    if images < clusters:
        raise UserError(
            f"{images} images cannot be put into {clusters} clusters; set poison.clusters "
            "(--clusters) to fewer."
        )


def parts_of(poison: Poison) -> list[dict[str, Any]]:
    """Return method, model steps and noise steps of each surrogate that a poison has been through.

    Earlier versions wrote the last surrogate's model steps alone; what is not known is None.
    """
    if "parts" in poison.info:
        parts: list[dict[str, Any]] = json.loads(poison.info["parts"])
        return parts
    if "schedule" not in poison.info:
        return []
    steps = json.loads(poison.info["schedule"]).get("surrogate_steps_done")
    return [{"method": poison.info.get("method"), "model_steps": steps, "noise_steps": None}]


def _chosen(
    raw: RawDataset, labels: Tensor | None, config: AlternationConfig
) -> tuple[Tensor, Tensor, int | None]:
    """Return which images are poisoned, bool (N), their keys, and how many could be.

    With the whole data set nothing is read: no keys, and no count.
    """
    if config.fraction == 1:
        return torch.ones(len(raw), dtype=torch.bool), torch.empty(0), None
    of_all = torch.tensor([raw[image].key for image in range(len(raw))])
    keys = keys_of_part(of_all, labels, config.fraction)
    countable = of_all
    if config.granularity == "class" and labels is not None:
        countable = of_all[labels >= 0]  # the others carry no class poison by design
    return torch.isin(of_all, keys), keys, len(torch.unique(countable))


def _check_shapes(tensors: Mapping[str, Any], shape: tuple[int, ...], keyed: bool) -> None:
    """Check that a snapshot has the form that the data set asks for.

    Raises:
        UserError: it is that of another data set or of other settings, or no snapshot.
    """
    expected = {"delta": shape, **({"keys": shape[:1]} if keyed else {})}
    if "moved" in tensors:
        expected["moved"] = shape[:1]
    found = {name: tuple(tensors[name].shape) for name in expected if name in tensors}
    if found != expected:
        raise UserError(
            f"the checkpoint's snapshot holds {found}, and this data set needs {expected}; resume "
            "with the data set and the settings that it was made with, or start anew."
        )


def _check_keys(
    tensors: Mapping[str, Any], rows: Rows, keys: Tensor, count: int, config: AlternationConfig
) -> None:
    """Take over the keys of a snapshot.

    Raises:
        UserError: they are those of other images.
    """
    if rows.keys is not None:
        saved: Tensor = tensors["keys"]
        known = saved[saved != 0] if config.fraction < 1 else saved[:0]
        if len(saved) != count or not bool(torch.isin(known, keys).all()):
            raise UserError(
                f"the checkpoint's perturbation has {len(saved)} rows of other images "
                f"than the {count} that poison.fraction={config.fraction} poisons here; "
                "resume with the data set, the settings and the version that it was made "
                "with, or start anew."
            )
        rows.restore(saved)


def taken_up(
    tensors: Mapping[str, Tensor | RowFile], config: AlternationConfig, folder: Path
) -> Perturbation:
    """Return the perturbation of a snapshot, to go on with.

    Args:
        tensors: as `cp_plugin.attack.snapshot.load` gives them.
        config: eps is read from it.
        folder: where a perturbation too large for memory is.
    """
    delta = tensors["delta"]
    if isinstance(delta, RowFile):
        file = own_rows(folder)
        perturbation = Perturbation.continued(delta, config.eps, file, not _is_large(delta.nbytes))
        _forget(perturbation, file)
    else:
        perturbation = Perturbation(delta, config.eps)
    # Snapshots of earlier versions do not tell; their rows count as moved.
    moved = tensors.get("moved", torch.ones_like(perturbation.moved))
    assert isinstance(moved, Tensor)
    perturbation.moved = moved
    return perturbation


def _noise(
    raw: RawDataset,
    count: int,
    config: AlternationConfig,
    folder: Path,
    generator: torch.Generator,
) -> Perturbation:
    channels, height, width = raw[0].image.shape
    shape = (channels, height, width)
    large = _is_large(count * math.prod(shape) * DTYPES[config.dtype].itemsize)
    file = own_rows(folder) if large else None
    if config.init == ZERO:
        made = Perturbation.zeros(count, shape, config.eps, config.dtype, file)
    else:
        made = Perturbation.uniform(count, shape, config.eps, config.dtype, generator, file)
    _forget(made, file)
    return made


def _is_large(bytes_: int) -> bool:
    """Whether rows are kept in a file: they would take too much memory of all processes here."""
    largest = min(LARGEST_IN_MEMORY, available_bytes() // share().processes // 2)
    return RowFile.available and bytes_ > largest


def own_rows(folder: Path) -> Path:
    """Return where this process has its rows: the first one in the run's folder, for snapshots."""
    return new_rows(folder if share().rank == 0 else Path(tempfile.gettempdir()))


def _forget(perturbation: Perturbation, file: Path | None) -> None:
    """Let the rows of a process that saves none vanish with it."""
    if share().rank > 0 and isinstance(perturbation.rows, RowFile) and file is not None:
        perturbation.rows.remove()


def check_init(poison: Poison, fit: Fit, shape: tuple[int, ...]) -> None:
    """Check that a poison to start from has rows of the right form.

    Raises:
        UserError: it has not.
    """
    if poison.fit != fit:
        raise UserError(
            f"poison.init was made with fit: {poison.fit}, this run has {fit}; set "
            f"poison.fit={poison.fit}."
        )
    if poison.perturbation.shape != shape:
        raise UserError(
            f"poison.init has deltas of shape {poison.perturbation.shape}, this run needs "
            f"{shape}; use a poison of the same image size."
        )


def _take_over(
    poison: Poison,
    raw: RawDataset,
    labels: Tensor | None,
    perturbation: Perturbation,
    rows: Rows,
) -> None:
    """Take over rows of a poison file: of the data set's classes, or of the same images."""
    check_init(poison, raw.canonical.fit, perturbation.shape)
    names = names_or_numbers(raw.dataset)
    poison.check_classes(names)
    for first in range(0, len(raw), 1024):
        images = torch.arange(first, min(first + 1024, len(raw)))
        own = rows.of_image[images]
        if poison.needs_labels:
            known = [None] * len(images) if labels is None else labels[images].tolist()
            of_images = [names[y] if names and y is not None and y >= 0 else None for y in known]
            theirs = poison.rows(classes=of_images)
        else:
            theirs = poison.rows(keys=[raw[int(image)].key for image in images])
        use = (own >= 0) & (theirs >= 0)
        perturbation.write(own[use], poison.perturbation.gather(theirs[use]))


def _pass_over_shuffles(labels: Tensor | None, count: int, generator: torch.Generator) -> None:
    """Draw what a seeded choice of images once drew first: a seed keeps the start that it gave."""
    groups = torch.zeros(count, dtype=torch.int64) if labels is None else labels
    for members in torch.unique(groups, return_counts=True)[1].tolist():
        torch.randperm(members, generator=generator)
