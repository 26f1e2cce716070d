"""From runs to pictures: which poisons and encoders are shown, and on which images."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf
from torch import Tensor

from cp_plugin.apps.report import figures
from cp_plugin.apps.report.projection import project
from cp_plugin.apps.report.rows import Row
from cp_plugin.apps.report.tables import ordered
from cp_plugin.apps.study.settings import NONE
from cp_plugin.attack.poison_file import Poison
from cp_plugin.config.settings import UserError
from cp_plugin.config.yaml_files import load_yaml
from cp_plugin.data import RawDataset, class_names, labels, load
from cp_plugin.evaluation.delta_statistics import first_rows
from cp_plugin.evaluation.spectra import power, radial
from cp_plugin.util.run_files import CONFIG_FILE

log = logging.getLogger("cp_plugin")

IMAGES_SHOWN = 6


@dataclass(frozen=True)
class Picture:
    """A picture with its title and caption."""

    title: str
    uri: str
    caption: str


@dataclass(frozen=True)
class Maps:
    """Maps of features, and the colour of each class."""

    pictures: tuple[Picture, ...]
    classes: tuple[tuple[str, str], ...]


def curves(rows: Sequence[Row], colour: Mapping[str, str]) -> list[Picture]:
    """Return kNN curves, one picture a victim, for each defence and backbone."""
    made = []
    keys = ordered_keys(rows)
    for victim, backbone, defence in keys:
        part = [
            row
            for row in rows
            if (row.victim, row.backbone, row.defence) == (victim, backbone, defence)
        ]
        uri = figures.curves(part, colour)
        if uri is not None:
            seeds = ", ".join(map(str, sorted({row.seed for row in part})))
            title = victim if defence == NONE else f"{victim}, defence {defence}"
            caption = (
                f"{backbone}; mean over seeds {seeds}. Solid: clean bank, dashed: poisoned, "
                "dotted: the clean encoder on the poisoned bank (control)."
            )
            made.append(Picture(title, uri, caption))
    return made


def ordered_keys(rows: Sequence[Row]) -> list[tuple[str, str, str]]:
    """Return victim, backbone and defence of the rows, without repetition."""
    return list(dict.fromkeys((row.victim, row.backbone, row.defence) for row in rows))


def poisons(rows: Sequence[Row]) -> dict[str, tuple[Row, Poison]]:
    """Return one file of each poison, with the first run that it was used in."""
    found: dict[str, tuple[Row, Poison]] = {}
    for row in rows:
        if row.poison_file is not None and row.label not in found:
            found[row.label] = (row, Poison.load(row.poison_file))
    return found


def images(found: Mapping[str, tuple[Row, Poison]]) -> list[Picture]:
    """Return original, perturbation and poisoned images of each poison."""
    made = []
    for label, (row, poison) in found.items():
        try:
            train, _ = data_of(row)
        except UserError as error:
            log.warning("%s is not shown on images: %s", label, error)
            continue
        raw = RawDataset(train, poison.size, poison.fit)
        names, known = class_names(train), labels(train)
        chosen = _one_a_class(known) if known is not None else range(IMAGES_SHOWN)
        items = [raw[number] for number in chosen]
        classes = None if known is None or names is None else [names[known[one]] for one in chosen]
        of_images = poison.rows([item.key for item in items], classes)
        clean = torch.stack([item.image for item in items])
        whose = "a class" if poison.granularity == "class" else "an image"
        budget = (
            f"one delta {whose}, eps {255 * poison.eps:.0f}/255; seed {row.seed}. "
            "Perturbation: -eps black, +eps white."
        )
        made.append(Picture(label, figures.pictures(poison, clean, of_images), budget))
    return made


def spectra(
    found: Mapping[str, tuple[Row, Poison]], colour: Mapping[str, str]
) -> tuple[list[Picture], str | None]:
    """Return a spectrum of each poison, and a picture of all their radial profiles."""
    powers, captions = {}, {}
    for label, (row, poison) in found.items():
        rows = first_rows(poison)
        powers[label] = power(rows)
        captions[label] = f"mean of {len(rows)} rows, seed {row.seed}"
    if not powers:
        return [], None
    limits = figures.common_limits(list(powers.values()))
    made = [
        Picture(label, figures.spectrum(shown, limits), captions[label])
        for label, shown in powers.items()
    ]
    profiles = {label: radial(shown) for label, shown in powers.items()}
    return made, figures.profiles(profiles, colour)


def maps(rows: Sequence[Row], projection: str) -> Maps:
    """Return maps of test features: of clean encoders, and beside them those of victims.

    Args:
        rows: all of the report.
        projection: how features come to lie in a plane, of `cp_plugin.apps.report.projection`.
    """
    made: list[Picture] = []
    classes: tuple[tuple[str, str], ...] = ()
    first = rows[0]
    for label in ordered(row.label for row in rows):
        row = next((row for row in _alike(rows, first) if row.label == label), None)
        if row is None:
            continue
        try:
            features, known, names = _test_features(row)
        except UserError as error:
            log.warning("no map of features of %s: %s", label, error)
            continue
        classes = tuple(figures.class_key(names))
        mapped = project(features, known, projection)
        title = "clean" if label == NONE else label
        caption = f"{row.victim}, {row.backbone}, seed {row.seed}"
        made.append(Picture(title, figures.feature_map(*mapped, names), caption))
    return Maps(tuple(made), classes)


def settings(folders: Mapping[str, Path]) -> tuple[dict[str, str], dict[str, dict[str, str]]]:
    """Return the settings that all runs share, and those in which each run differs."""
    flat = {
        name: _flat(load_yaml(folder / CONFIG_FILE))
        for name, folder in folders.items()
        if (folder / CONFIG_FILE).is_file()
    }
    keys = ordered(key for one in flat.values() for key in one)
    shared = {}
    for key in keys:
        values = {one.get(key) for one in flat.values()}
        if len(values) == 1:
            shared[key] = str(values.pop())
    own = {
        name: {key: value for key, value in one.items() if key not in shared}
        for name, one in flat.items()
    }
    return shared, own


def _alike(rows: Sequence[Row], first: Row) -> list[Row]:
    key = (first.victim, first.backbone, first.defence)
    return [row for row in rows if (row.victim, row.backbone, row.defence) == key]


def _test_features(row: Row) -> tuple[Tensor, Tensor, Sequence[str]]:
    from cp_plugin.apps.engine_runs import load_run
    from cp_plugin.engine.pipeline import build_pipeline
    from cp_plugin.evaluation.banks import Bank
    from cp_plugin.hosts.lightning import LightningHost
    from cp_plugin.mirror import mirror

    module, cfg = load_run(row.folder)
    _, test = data_of(row)
    if test is None:
        raise UserError("the run has no test images.")
    view_mirror = mirror(build_pipeline(cfg))
    host = LightningHost(module, lambda sample, _: sample, ())
    bank = Bank.clean(test, view_mirror.crop_size)
    names = bank.classes or [str(label) for label in range(int(bank.labels.max()) + 1)]
    return bank.features(host.encode, view_mirror.normalize), bank.labels, names


def data_of(row: Row) -> tuple[Any, Any]:
    """Return training and test images of a run; None for the latter where it has none.

    Raises:
        UserError: they are not where they were.
    """
    cfg = load_yaml(row.folder / CONFIG_FILE)
    assert isinstance(cfg, DictConfig)
    data = cfg.data
    return _loaded(data.dataset, data.train_path, data.val_path, data.no_labels)


@lru_cache(maxsize=2)
def _loaded(*source: Any) -> tuple[Any, Any]:
    """Return training and test set; the runs of a study share theirs."""
    return load(*source)


def _one_a_class(known: Tensor) -> list[int]:
    wanted = sorted(set(known[known >= 0].tolist()))[:IMAGES_SHOWN]
    return [int((known == label).nonzero()[0]) for label in wanted]


def _flat(node: Any, prefix: str = "") -> dict[str, str]:
    plain = OmegaConf.to_container(node) if OmegaConf.is_config(node) else node
    if isinstance(plain, dict):
        pairs = [(str(key), value) for key, value in plain.items()]
    elif isinstance(plain, list) and any(isinstance(item, (dict, list)) for item in plain):
        pairs = [(str(number), value) for number, value in enumerate(plain)]
    else:
        return {prefix: str(plain)}
    flat: dict[str, str] = {}
    for key, value in pairs:
        flat |= _flat(value, f"{prefix}.{key}" if prefix else key)
    return flat
