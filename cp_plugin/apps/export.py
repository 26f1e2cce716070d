"""Poisons in and out: poisoned images as PNG files, the authors' `.pth` files as poisons."""

from __future__ import annotations

import argparse
import json
import pickle
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf
from torchvision.transforms.functional import to_pil_image

from cp_plugin.apps.solo_runs import configuration, is_solo_run, training_images
from cp_plugin.attack.inject import AddPoison, part
from cp_plugin.attack.perturbation import Perturbation
from cp_plugin.attack.poison_file import Poison
from cp_plugin.config.settings import UserError, check_eps
from cp_plugin.data import RawDataset, class_names, labels, load, names_or_numbers
from cp_plugin.data.wrappers import file_of
from cp_plugin.util.provenance import versions
from cp_plugin.util.run_files import CONFIG_FILE


def export(poison_file: Path, out: Path, data: Path | None = None) -> int:
    """Write the poisoned images as 8-bit PNG files, an image folder.

    Names are those of the images relative to their folder, with the ending `.png`; images that are
    no files of their own are `<class>/<row>.png`.

    Args:
        poison_file: the poison.
        out: a new or empty folder.
        data: the folder of clean images; None: the data set of the run that the poison lies in.

    Returns:
        The number of images written.

    Raises:
        UserError: the folder is not empty, the data set is not known, or has other images.
    """
    poison = Poison.load(poison_file)
    if out.exists() and any(out.iterdir()):
        raise UserError(f"{out} is not empty; give a new folder.")
    dataset = _dataset(poison_file, data)
    part(dataset, poison, 1.0)
    raw = RawDataset(dataset, poison.size)
    known, names = labels(dataset), names_or_numbers(dataset)
    add = AddPoison(poison, names)
    relative = list(_relative_names(raw, known, names))
    if len(set(relative)) < len(relative):
        raise UserError(
            "two images would get the same name, since their names differ only by their ending; "
            "rename one of them."
        )
    for row, name in enumerate(relative):
        item = raw[row]
        image = add(item.image, item.key, -1 if known is None else int(known[row]))
        (out / name).parent.mkdir(parents=True, exist_ok=True)
        to_pil_image(image).save(out / name)
    return len(relative)


def _dataset(poison_file: Path, data: Path | None) -> Any:
    if data is not None:
        has_classes = data.is_dir() and any(entry.is_dir() for entry in data.iterdir())
        return load("custom", data, no_labels=not has_classes)[0]
    if is_solo_run(poison_file.parent):
        return training_images(configuration(poison_file.parent))
    config = poison_file.parent / CONFIG_FILE
    if not config.is_file():
        raise UserError(
            f"there is no {CONFIG_FILE} beside the poison, so its data set is not known; give the "
            "folder of clean images with --data DIR."
        )
    cfg = OmegaConf.load(config)
    assert isinstance(cfg, DictConfig)
    return load(cfg.data.dataset, cfg.data.train_path, None, cfg.data.no_labels)[0]


def _relative_names(raw: RawDataset, known: Any, names: tuple[str, ...] | None) -> Iterator[Path]:
    dataset = raw.dataset
    root = getattr(dataset, "root", None)
    for row in range(len(raw)):
        file = file_of(dataset, row)
        if file is not None and root is not None:
            yield Path(file).relative_to(root).with_suffix(".png")
        else:
            label = -1 if known is None else int(known[row])
            folder = names[label] if names and label >= 0 else "unlabelled"
            yield Path(folder) / f"{row:06d}.png"


def import_poison(file: Path, out: Path, dataset: str, data: Path | None, eps: float) -> Poison:
    """Convert a poison of the authors' code (github.com/kaiwenzha/contrastive-poisoning).

    Theirs is a tensor (K, C, H, W) in units of eps, alone or as `model.delta` of a checkpoint, its
    rows in the order of the data set or of its classes; hence the data set is needed to give the
    rows their keys.

    Args:
        file: the `.pth` file; it is read with `weights_only`, so it runs no code.
        out: the poison file to write.
        dataset: as `data.dataset`: `cifar10`, `cifar100`, `custom`, …
        data: the folder where the data set is.
        eps: of the poison, in [0, 1].

    Raises:
        UserError: the file holds no such tensor, or it does not fit the data set.
    """
    delta = _authors_delta(file)
    train = load(dataset, data)[0]
    raw = RawDataset(train, delta.shape[-1])
    names = class_names(train)
    stored = delta.clamp(-1, 1) * check_eps(eps)
    info = {"host": "contrastive-poisoning", "method": "unknown"}
    info["versions"] = json.dumps(versions())
    if names is not None and len(delta) == len(names):
        poison = Poison(Perturbation(stored, eps), "class", None, names, info)
    elif len(delta) == len(raw):
        keys = torch.tensor([raw[row].key for row in range(len(raw))])
        poison = Poison(
            Perturbation(stored.half().clamp(-eps, eps), eps), "sample", keys, None, info
        )
    else:
        raise UserError(
            f"{file} has {len(delta)} rows; the data set has {len(raw)} images in "
            f"{len(names or ())} classes. Give the data set that the poison was made for."
        )
    poison.save(out)
    return poison


def _authors_delta(file: Path) -> torch.Tensor:
    if not file.is_file():
        raise UserError(f"there is no file at {file}.")
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):
            content: Any = torch.load(file, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, OSError) as error:
        reason = str(error).splitlines()[0] if str(error) else "empty"
        raise UserError(f"{file} cannot be read as plain tensors ({reason}).") from error
    if isinstance(content, dict):
        model = content.get("model", content)
        content = model.get("delta", model.get("module.delta")) if isinstance(model, dict) else None
    if not isinstance(content, torch.Tensor) or content.ndim != 4:
        raise UserError(f"{file} holds no tensor `delta` of shape (K, C, H, W).")
    return content.detach().float()
