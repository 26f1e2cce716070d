"""Measuring a trained run, of the embedded engine or of solo-learn: checkpoint, data, poison."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf
from torch import Tensor
from torch.nn import Module

from cp_plugin.apps.runs import Run, run_in
from cp_plugin.attack.inject import part
from cp_plugin.attack.poison_file import Poison
from cp_plugin.config.selection import GROUPS
from cp_plugin.config.settings import UserError
from cp_plugin.config.yaml_files import load_yaml
from cp_plugin.data import class_names, load
from cp_plugin.data.canonical import canonical_form
from cp_plugin.data.datasets import FOLDERS, class_folder
from cp_plugin.data.labels import renumbered
from cp_plugin.engine.readability import Readability, readability
from cp_plugin.engine.run import check
from cp_plugin.engine.supervised import Supervised
from cp_plugin.evaluation.banks import Bank
from cp_plugin.evaluation.finetune import check_fraction
from cp_plugin.evaluation.finetune import finetune as fine_tune
from cp_plugin.evaluation.metrics import COSINE, NONE, PAPER, PROBES, knn, linear_probe
from cp_plugin.evaluation.paper_probe import paper_probe
from cp_plugin.mirror import mirror
from cp_plugin.util.run_files import CONFIG_FILE, POISON_FILE

log = logging.getLogger("cp_plugin")

CLEAN, POISONED = "clean", "poisoned"
"""The banks by name."""


def poison_of(folder: Path) -> Poison | None:
    """Return the poison that a run made or was trained on, None for a clean run."""
    if (folder / POISON_FILE).is_file():
        return Poison.load(folder / POISON_FILE)
    cfg = run_in(folder).configuration()
    path = None if cfg is None else OmegaConf.select(cfg, "poison.path")
    return Poison.load(path) if path else None


def evaluate(
    checkpoint: Path,
    poison: Poison | None = None,
    k: int | None = None,
    temperature: float = 0.07,
    probe: str = COSINE,
    data: Path | None = None,
    test: Path | None = None,
    finetune: float | None = None,
    sets: Sets | None = None,
) -> list[dict[str, Any]]:
    """Measure an encoder by kNN, linear probe and fine-tuning on the clean and the poisoned bank.

    Args:
        checkpoint: a checkpoint or the folder of a run, of the embedded engine or of solo-learn.
        poison: of the poisoned bank; None: the run's own, if it has one.
        k: neighbours; None: 200, or 20 where the bank has fewer than 5,000 images.
        temperature: of the votes.
        probe: `cosine`, our linear probe; `paper`, the authors' beside it; or `none`.
        data: another folder of images as the bank; None: the run's training set.
        test: another folder of images as queries; None: the run's test set.
        finetune: also fine-tune the encoder on this part of each bank's labels, in (0, 1].
        sets: banks and queries that were read before, in place of `poison`, `data` and `test`.

    Returns:
        One row a bank: `bank`, `knn`, `linear`, `linear_paper` and `finetune` with their settings,
        accuracies in percent, probes with their protocol. A supervised run's clean row has
        `classifier` too: what its own one gets right.

    Raises:
        UserError: checkpoint, data set or poison cannot be used.
    """
    if finetune is not None:
        check_fraction(finetune)
    if probe not in PROBES:
        raise UserError(f"probe must be one of {', '.join(PROBES)}; got {probe!r}.")
    folder = checkpoint if checkpoint.is_dir() else checkpoint.parent
    run = run_in(folder)
    host, pipeline, cfg = run.trained(checkpoint)
    if sets is None:
        sets = _sets(run, pipeline, cfg, poison or poison_of(folder), data, test)
    _accelerate(host.module)
    query_features = sets.query.features(host.encode, sets.normalize)
    rows = []
    for bank_name, bank in sets.banks.items():
        found = bank.features(host.encode, sets.normalize)
        features = (found, bank.labels, query_features, sets.query.labels)
        row: dict[str, Any] = {"bank": bank_name}
        row["knn"] = asdict(knn(*features, k=k, temperature=temperature))
        if probe != NONE:
            row["linear"] = asdict(linear_probe(*features, seed=cfg.seed, device=host.device))
        if probe == PAPER:
            theirs = paper_probe(host.encode, sets.normalize, bank, sets.query, seed=cfg.seed)
            row["linear_paper"] = asdict(theirs)
        if finetune is not None:
            tuned = fine_tune(host.encoder(), sets.normalize, bank, sets.query, finetune, cfg.seed)
            row["finetune"] = asdict(tuned)
        rows.append(row)
    if isinstance(host.module, Supervised):
        known = _own_numbers(run, cfg, sets.query, data is not None or test is not None)
        if known is not None:
            for row in rows:
                if row["bank"] == CLEAN:
                    row["classifier"] = _correct(host.module, query_features, known)
    return rows


@torch.no_grad()
def _correct(module: Supervised, features_MD: Tensor, labels_M: Tensor) -> float:
    """Return how many labelled images a run's own classifier gets right, in percent."""
    right = module.classifier(features_MD.to(module.device)).argmax(1).cpu() == labels_M
    return 100 * float(right[labels_M >= 0].double().mean())


def control_curve(run: Path, sets: Sets) -> list[dict[str, Any]]:
    """Measure a clean run's encoder on a poisoned bank at every checkpoint that the run kept.

    Beside the curve of a victim of the poison this tells what training on it did, and what the
    poisoned bank alone does to any encoder.

    Args:
        run: the folder of a run of the embedded engine; `checkpoint.keep_prev=true` keeps all
            checkpoints, `checkpoint.frequency` epochs apart.
        sets: of a victim of the poison, whose poisoned bank is taken.

    Returns:
        One row a checkpoint, in the order of training: `step` and `knn_control`, percent; none
        where the run kept its last one only.

    Raises:
        UserError: a checkpoint cannot be used.
    """
    files = {_step_of(file): file for file in sorted(run.glob("*.ckpt"))}
    if len(files) < 2:
        return []
    clean = run_in(run)
    bank, rows = sets.banks[POISONED], []
    for step, file in sorted(files.items()):
        host = clean.trained(file)[0]
        _accelerate(host.module)
        found, query = (one.features(host.encode, sets.normalize) for one in (bank, sets.query))
        near = knn(found, bank.labels, query, sets.query.labels)
        rows.append({"step": step, "knn_control": near.accuracy})
    return rows


def read_by_surrogates(
    poison: Path, run: Path | None = None, steps: int = 300, seeds: int = 3
) -> Readability:
    """Measure how soon fresh surrogates discover a poison, see `readability`.

    Args:
        poison: a poison file.
        run: the folder of a run of the embedded engine, whose method, backbone, augmentations and
            data set the surrogates have; None: that which the poison lies in.
        steps: optimiser steps of each surrogate.
        seeds: how many surrogates of each kind.

    Raises:
        UserError: there is no configuration, or poison and data set do not fit.
    """
    config = (run or poison.parent) / CONFIG_FILE
    if not config.is_file():
        raise UserError(
            f"there is no configuration of a surrogate at {config}; name the folder of a run of "
            "the embedded engine with --run DIR."
        )
    cfg = load_yaml(config)
    assert isinstance(cfg, DictConfig)
    for group in GROUPS:
        cfg.pop(group, None)
    return readability(check(cfg)[1], Poison.load(poison), steps, range(seeds))


@dataclass(frozen=True)
class Sets:
    """What encoders are measured on; images are read once for all of them."""

    banks: dict[str, Bank]
    """By name, `clean` and `poisoned`."""
    query: Bank
    normalize: Callable[[Tensor], Tensor]

    @property
    def poisoned(self) -> Sets:
        """The same without the clean bank."""
        return replace(self, banks={POISONED: self.banks[POISONED]})


def sets_of(checkpoint: Path, poison: Poison | None = None) -> Sets:
    """Read the images that a run's encoder is measured on.

    Args:
        checkpoint: a checkpoint or the folder of a run, of the embedded engine or of solo-learn.
        poison: of the poisoned bank; None: the run's own, if it has one.

    Raises:
        UserError: checkpoint, data set or poison cannot be used.
    """
    folder = checkpoint if checkpoint.is_dir() else checkpoint.parent
    run = run_in(folder)
    _, pipeline, cfg = run.trained(checkpoint)
    return _sets(run, pipeline, cfg, poison or poison_of(folder), None, None)


def _accelerate(module: Module) -> None:
    """Bring an encoder to the accelerator, where there is one that training would have used."""
    if torch.cuda.is_available():
        module.cuda()


def _sets(
    run: Run,
    pipeline: Any,
    cfg: DictConfig,
    poison: Poison | None,
    data: Path | None,
    test: Path | None,
) -> Sets:
    train = run.training_images(cfg) if data is None else class_folder(data, "--data")
    tests = _tests(cfg.data, data, test)
    view_mirror = mirror(pipeline)
    sizes = (view_mirror.view_size, canonical_form(train, view_mirror.resized_side).size)
    clean = Bank.clean(train, *sizes)
    query = _numbered(Bank.clean(tests, *sizes), clean, data, test)
    banks = {CLEAN: clean}
    if poison is not None:
        try:
            part(train, poison, 1.0)
            banks[POISONED] = clean.poisoned(poison)
            if data is not None and poison.owned_keys is None:
                log.warning(
                    "the poison of whole classes is added to the images of %s for the poisoned "
                    "bank; where they carry it already, as exported ones do, the clean bank is "
                    "what they are",
                    data,
                )
        except UserError as error:
            if data is None:
                raise
            # Other images may be what is asked for: exported ones are a poisoned bank themselves.
            log.warning("there is no poisoned bank of %s: %s", data, error)
    return Sets(banks, query, view_mirror.normalize)


def _tests(source: DictConfig, data: Path | None, test: Path | None) -> Any:
    """Return the labelled test images: those given, or the run's own.

    Raises:
        UserError: there are none.
    """
    if test is not None:
        return class_folder(test, "--test")
    if data is not None and source.dataset in FOLDERS and source.val_path is not None:
        return class_folder(source.val_path, "data.val_path")  # the run's own bank is not asked for
    tests = load(source.dataset, source.train_path, source.val_path, source.no_labels)[1]
    if tests is None:
        raise UserError("kNN needs labelled test images; give their folder with --test DIR.")
    return tests


def _numbered(query: Bank, bank: Bank, data: Path | None, test: Path | None) -> Bank:
    """Return the query with the bank's numbers of classes.

    Raises:
        UserError: it has images of a class that the bank lacks.
    """
    try:
        return query.numbered_as(bank)
    except UserError as error:
        if data is None or test is not None:
            raise
        raise UserError(
            f"the bank {data} is compared with the run's own test images; give those of its "
            f"classes with --test DIR: {error}"
        ) from None


def _own_numbers(run: Run, cfg: DictConfig, query: Bank, given: bool) -> Tensor | None:
    """Return the query's labels as a run's own classifier numbers them, None if that is unknown."""
    if not given:
        return query.labels
    try:
        own = class_names(run.training_images(cfg))
        return renumbered(query.labels, query.classes, own)
    except UserError as error:
        log.warning("what the run's own classifier gets right is left out: %s", error)
        return None


def _step_of(file: Path) -> int:
    """Return the optimiser steps that a checkpoint of the embedded engine was saved after."""
    saved = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
    return int(saved["global_step"])
