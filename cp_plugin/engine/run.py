"""One run of the embedded engine: a configuration in, a folder with everything out."""

from __future__ import annotations

import functools
import json
import logging
import time
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import torch
from lightning.pytorch import Trainer, seed_everything
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from omegaconf import DictConfig, OmegaConf
from torch import Tensor, nn
from torch.utils.data import DataLoader

from cp_plugin.attack.poison_file import Poison
from cp_plugin.callbacks import CraftPoison, Defence, InjectPoison, KNNMonitor
from cp_plugin.callbacks.progress import RunProgress
from cp_plugin.callbacks.selected import selected_callbacks
from cp_plugin.config.selection import Selection
from cp_plugin.config.settings import UserError
from cp_plugin.data import load
from cp_plugin.engine.base import Method
from cp_plugin.engine.checkpoints import WholeCheckpoints, check_checkpoint
from cp_plugin.engine.clusters import placement
from cp_plugin.engine.compatibility import check_method, name_classes
from cp_plugin.engine.loggers import run_loggers
from cp_plugin.engine.methods import build_method
from cp_plugin.engine.pipeline import build_pipeline
from cp_plugin.engine.precision import fast_on_processor
from cp_plugin.engine.settings import complete, for_surrogate
from cp_plugin.engine.whitening import fit_whitening
from cp_plugin.mirror import mirror
from cp_plugin.util.provenance import command, hardware, versions
from cp_plugin.util.run_files import CHECKPOINT, CONFIG_FILE, RESULT_FILE
from cp_plugin.util.whole_files import clear_partial, write_text

log = logging.getLogger("cp_plugin")


def quiet() -> None:
    """Leave out what Lightning says of every trainer; it sets INFO when it is imported."""
    for name in ("lightning.pytorch", "pytorch_lightning"):
        logging.getLogger(name).setLevel(logging.WARNING)


def run(cfg: DictConfig, watching: Sequence[Callback] = ()) -> dict[str, Any]:
    """Craft a poison, train a victim or a clean baseline, as the configuration says.

    Args:
        cfg: solo-learn's schema, with the groups `poison`, `monitor` and `defence` where selected.
        watching: callbacks of one's own, which see what those of the run have done.

    Returns:
        What is in `result.json`, with the run's folder as `folder`.

    Raises:
        UserError: anything in the configuration, the data or the poison that the user can mend.
    """
    quiet()
    selection, settings = check(cfg)
    folder, checkpoint, finished = _folder(
        settings, selection, str(cfg.get("precision", settings.precision))
    )
    if finished is not None:
        log.info("%s is finished; nothing to do", folder)
        return {**finished, "folder": str(folder)}
    known = checkpoint or settings.resume_from_checkpoint
    if known:
        known = check_checkpoint(known)
    seed_everything(settings.seed, workers=True, verbose=False)
    parts = prepare(settings)
    callbacks = [*_callbacks(selection, settings, folder, parts), *watching]
    write_text(folder / CONFIG_FILE, OmegaConf.to_yaml(settings, resolve=True))
    started = time.perf_counter()
    trainer = Trainer(
        max_epochs=settings.max_epochs,
        accelerator=settings.accelerator,
        devices=_devices(settings.devices),
        strategy=settings.strategy or "auto",
        precision=settings.precision,
        num_nodes=settings.num_nodes,
        sync_batchnorm=settings.sync_batchnorm,
        accumulate_grad_batches=settings.accumulate_grad_batches,
        callbacks=callbacks,
        logger=list(run_loggers(folder, settings)),
        plugins=[WholeCheckpoints()],
        default_root_dir=folder,
        enable_progress_bar=False,
        enable_model_summary=False,
        log_every_n_steps=min(50, len(parts.loader)),
    )
    trainer.fit(parts.module, parts.loader, ckpt_path=known)
    if settings.checkpoint.enabled:
        trainer.save_checkpoint(folder / f"{CHECKPOINT}.ckpt")
    result = _result(selection, settings, callbacks, trainer, time.perf_counter() - started)
    write_text(folder / RESULT_FILE, json.dumps(result, indent=1))
    return {**result, "folder": str(folder)}


class Parts(NamedTuple):
    """What a run trains and on what, before any callback."""

    module: Method
    loader: DataLoader[Any]
    train: Any
    """The training set, its transform the augmentations."""
    test: Any
    """The test set, None where there is none."""


def prepare(settings: DictConfig) -> Parts:
    """Build module, data sets and loader; random numbers come from torch's global generator.

    Args:
        settings: from `check`; the classes' number is filled in.

    Raises:
        UserError: the data set, the augmentations or the backbone cannot be used.
    """
    train, test = _data(settings)
    name_classes(settings, train)
    train.transform = build_pipeline(settings)
    view_mirror = mirror(train.transform)
    module = build_method(settings, view_mirror.crop_size or settings.augmentations[0].crop_size)
    fit_whitening(module, train, view_mirror)
    return Parts(module, _loader(train, settings), train, test)


def check(cfg: DictConfig) -> tuple[Selection, DictConfig]:
    """Return what a configuration selects and its completed settings; nothing is read or trained.

    Raises:
        UserError: an unknown name, a missing key, a value out of range, or poison and method do
            not go together.
    """
    selection, settings = Selection.read(cfg), complete(_without_gpu(cfg))
    if selection.crafts:
        settings = for_surrogate(settings)
    check_method(selection, settings)
    selection.check_method(settings.method)
    return selection, settings


def _without_gpu(cfg: DictConfig) -> DictConfig:
    """Let a configuration that asks for GPUs, or for their 16 bit, run on a machine without one."""
    asked = cfg.get("accelerator")
    chosen = asked == "auto" and torch.backends.mps.is_available()
    if torch.cuda.is_available() or chosen:
        return cfg
    changes: dict[str, Any] = {}
    if asked in ("gpu", "cuda"):
        changes = {"accelerator": "cpu", "devices": 1, "strategy": "auto", "sync_batchnorm": False}
    if str(cfg.get("precision")).startswith("16-") and asked in ("gpu", "cuda", "auto", "cpu"):
        changes["precision"] = fast_on_processor()
    if not changes:
        return cfg
    _say_no_gpu(" ".join(f"{key}={value}" for key, value in changes.items()))
    changed = cfg.copy()
    OmegaConf.set_struct(changed, False)
    changed.update(changes)
    return changed


@functools.cache
def _say_no_gpu(changes: str) -> None:
    """Say what is changed, once a process: a study checks each of its cells."""
    log.warning("no GPU here: %s", changes)


def _folder(
    cfg: DictConfig, selection: Selection, precision: str
) -> tuple[Path, str | None, dict[str, Any] | None]:
    """Return the run's folder, the checkpoint to go on from, and the result if it is finished.

    The folder goes by the precision that was asked for, not by what this machine makes of it.
    """
    unnamed = OmegaConf.to_container(cfg, resolve=True)
    assert isinstance(unnamed, dict)
    for key in ("auto_resume", "checkpoint", "wandb", "logger", "hydra"):
        unnamed.pop(key, None)
    unnamed["data"].pop("cache")  # it changes no pixel
    unnamed["precision"] = precision
    name = f"{cfg.name}-{selection.tag(unnamed)}"  # type: ignore[arg-type]
    parent = Path(cfg.checkpoint.dir) / cfg.method
    earlier = [parent / name, *sorted(parent.glob(f"{name}-[0-9]*"), key=_number)]
    existing = [folder for folder in earlier if folder.is_dir()]
    if cfg.auto_resume.enabled and existing:
        newest = existing[-1]
        clear_partial(newest)
        if (newest / RESULT_FILE).is_file():
            return newest, None, json.loads((newest / RESULT_FILE).read_text(encoding="utf8"))
        checkpoint = newest / f"{CHECKPOINT}.ckpt"
        return newest, str(checkpoint) if checkpoint.is_file() else None, None
    if not existing:
        return parent / name, None, None
    return parent / f"{name}-{_number(existing[-1]) + 1}", None, None


def _number(folder: Path) -> int:
    tail = folder.name.rsplit("-", 1)[-1]
    return int(tail) if tail.isdigit() and len(tail) < 8 else 1


def _data(cfg: DictConfig) -> tuple[Any, Any]:
    if cfg.data.fraction > 0:
        raise UserError(
            "data.fraction is not served by the embedded engine; give a smaller folder of images, "
            "or poison.fraction to poison a part."
        )
    return load(cfg.data.dataset, cfg.data.train_path, cfg.data.val_path, cfg.data.no_labels)


def _loader(train: Any, cfg: DictConfig) -> DataLoader[Any]:
    if len(train) < cfg.optimizer.batch_size:
        raise UserError(
            f"expected at least one batch of {cfg.optimizer.batch_size} images, got {len(train)}; "
            "set optimizer.batch_size to fewer."
        )
    return DataLoader(
        train,
        batch_size=cfg.optimizer.batch_size,
        shuffle=True,
        drop_last=True,
        num_workers=cfg.data.num_workers,
        # Persistent workers draw fewer seeds, so that batches would depend on how many there are.
        persistent_workers=False,
        pin_memory=torch.cuda.is_available(),
    )


def _callbacks(selection: Selection, cfg: DictConfig, folder: Path, parts: Parts) -> list[Callback]:
    if selection.monitor is not None and parts.test is None:
        raise UserError(
            "+monitor=knn needs labelled test images; set data.val_path=FOLDER, or leave the "
            "monitor out."
        )
    augment = cfg.get("augment", "host")
    callbacks = selected_callbacks(selection, folder, augment, bank=parts.train, query=parts.test)
    for callback in callbacks:
        if isinstance(callback, CraftPoison):
            callback.placed = functools.partial(_placed, cfg)
    if cfg.checkpoint.enabled:
        callbacks.append(
            ModelCheckpoint(
                dirpath=folder,
                filename=CHECKPOINT if not cfg.checkpoint.keep_prev else "{epoch}",
                save_top_k=-1 if cfg.checkpoint.keep_prev else 1,
                save_last=cfg.checkpoint.keep_prev,
                every_n_epochs=cfg.checkpoint.frequency,
                enable_version_counter=False,
                save_on_train_epoch_end=True,
            )
        )
    return [*callbacks, RunProgress(f"{cfg.method} {selection.label}")]


def _placed(
    cfg: DictConfig, encoder: nn.Module, centres: Tensor
) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Return what a poison by cluster carries to place further images, see `Placing`."""
    made = placement(encoder, cfg, centres)
    return made.tensors(), made.info()


def _devices(devices: Any) -> Any:
    return OmegaConf.to_container(devices) if OmegaConf.is_config(devices) else devices


def _result(
    selection: Selection,
    cfg: DictConfig,
    callbacks: Iterable[Callback],
    trainer: Trainer,
    seconds: float,
) -> dict[str, Any]:
    result: dict[str, Any] = {
        "poison": selection.name,
        "defence": selection.defence_name,
        "defence_settings": None if selection.defence is None else asdict(selection.defence),
        "granularity": None,
        "eps": None,
        "fraction": None,
        "method": cfg.method,
        "dataset": cfg.data.dataset,
        "seed": cfg.seed,
        "precision": str(cfg.precision),
        "epochs": trainer.current_epoch,
        "steps": trainer.global_step,
        "seconds": round(seconds, 1),
    }
    for callback in callbacks:
        if isinstance(callback, (CraftPoison, InjectPoison)):
            poison = callback.poison()
            result.update(_of_poison(poison))
        if isinstance(callback, Defence):
            result["defence_facts"] = callback.facts()
        if isinstance(callback, RunProgress):
            result["resumed_from_step"] = callback.first_step
        if isinstance(callback, KNNMonitor):
            result["knn"] = callback.results
            last = callback.results[-1]
            result.update(
                {key: last[key] for key in last if key not in ("epoch", "step", "seconds")}
            )
    loss = trainer.callback_metrics.get("train_loss")
    result["train_loss"] = None if loss is None else float(loss)
    result.update(hardware=hardware(), versions=versions(), command=command())
    return result


def _of_poison(poison: Poison) -> dict[str, Any]:
    schedule = json.loads(poison.info.get("schedule", "{}"))
    return {
        "granularity": poison.granularity,
        "eps": poison.eps,
        "fraction": poison.fraction,
        "surrogate": poison.info.get("method"),
        "surrogates": schedule.get("surrogates"),
        "surrogate_steps": schedule.get("surrogate_steps_done"),
    }
