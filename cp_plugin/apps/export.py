"""Poisons in and out: poisoned images as PNG files, the authors' `.pth` files as poisons."""

from __future__ import annotations

import argparse
import hashlib
import json
import pickle
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from PIL import Image, ImageOps
from torch.utils.data import Subset
from torchvision.transforms.functional import to_pil_image

from cp_plugin.apps.runs import run_in
from cp_plugin.attack.inject import AddPoison, part
from cp_plugin.attack.perturbation import Perturbation
from cp_plugin.attack.poison_file import Poison
from cp_plugin.config.settings import UserError, check_eps
from cp_plugin.data import (
    Canonical,
    RawDataset,
    SampleError,
    class_names,
    labels,
    load,
    names_or_numbers,
)
from cp_plugin.data.image import Size
from cp_plugin.data.picture_files import tell_left_out
from cp_plugin.data.raw import UNREADABLE
from cp_plugin.data.wrappers import file_of
from cp_plugin.util.provenance import versions
from cp_plugin.util.run_files import CONFIG_FILE

UNFINISHED = ".cp-plugin-export"
"""Lies in a folder while it is written, and names the poison: the same command goes on there."""
ORIENTATION = 0x0112
"""EXIF's tag of how a picture is turned when it is shown."""


def export(poison_file: Path, out: Path, data: Path | None = None) -> int:
    """Write the poisoned images as 8-bit PNG files, an image folder.

    Names are those of the images relative to their folder, with the ending `.png`, which follows
    the own one where two files differ by that only; images that are no files of their own are
    `<class>/<row>.png`. Transparency and the colour profile are kept, and pictures are upright.
    What has no row, cannot be read or is animated is left out and named in the log. An export that
    was interrupted goes on where it was.

    Args:
        poison_file: the poison.
        out: a new or empty folder, or that of an export of this poison that was interrupted.
        data: the folder of clean images; None: the data set of the run that the poison lies in.

    Returns:
        The number of images that are there.

    Raises:
        UserError: the folder holds something else, the data set is not known, or has other images.
    """
    poison = Poison.load(poison_file)
    mark = _started(poison_file, out)
    dataset = _dataset(poison_file, data, by_class=poison.granularity == "class")
    if poison.granularity == "class" or poison.fraction < 1:
        part(dataset, poison, 1.0)
    known, names = labels(dataset), names_or_numbers(dataset)
    add = AddPoison(poison, names if poison.granularity == "class" else None)
    left_out: dict[Path, str] = {}
    resized: dict[Path, str] = {}
    raw, skipped = _readable(dataset, poison.size)
    written = 0
    for row, name in enumerate(_distinct(list(_relative_names(dataset, known, names)))):
        file = file_of(dataset, row)
        source = Path(file or name)
        if file is not None and _is_animated(source):
            left_out[source] = "animated"
            continue
        if not (out / name).exists():
            try:
                if row < skipped:
                    raise SampleError("unreadable")
                item = raw[row - skipped]
                image = add(item.image, item.key, -1 if known is None else int(known[row]))
            except SampleError as error:
                missing = "no row" in str(error)
                left_out[source] = "the poison has no row for it" if missing else "unreadable"
                continue
            mark.parent.mkdir(parents=True, exist_ok=True)
            mark.write_text(_digest(poison_file), encoding="utf8")
            _write(to_pil_image(image), file, out / name, poison)
        if file is not None and (size := _size(source)) != poison.size:
            resized[source] = f"{size[0]} x {size[1]}"
        written += 1
    if not written:
        raise UserError(
            f"the poison has no row for any of the {len(dataset)} images; use the data set it was "
            "made for."
        )
    mark.unlink(missing_ok=True)
    tell_left_out(out, left_out)
    tell_left_out(out, resized, "resized and cropped to {} x {}".format(*poison.size))
    return written


def _readable(dataset: Any, size: Size) -> tuple[RawDataset, int]:
    """Return the data set from its first readable image on, and how many come before.

    Raises:
        UserError: none is readable.
    """
    for skipped in range(len(dataset)):
        rows = range(skipped, len(dataset))
        try:
            return RawDataset(Subset(dataset, rows) if skipped else dataset, size), skipped
        except SampleError:
            if skipped == len(dataset) - 1:
                raise
    raise AssertionError("a data set is never empty here")


def _started(poison_file: Path, out: Path) -> Path:
    """Return the file that marks an unfinished export.

    Raises:
        UserError: the folder holds something else.
    """
    mark = out / UNFINISHED
    if not out.exists() or not any(out.iterdir()):
        return mark
    if not mark.is_file():
        raise UserError(f"{out} is not empty; give a new folder.")
    if mark.read_text(encoding="utf8") != _digest(poison_file):
        raise UserError(
            f"{out} holds an unfinished export of another poison; give a new folder, or delete it."
        )
    return mark


def _digest(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()


def _write(picture: Image.Image, file: str | None, path: Path, poison: Poison) -> None:
    """Write a poisoned picture with what its file has beside colours; whole, or not at all."""
    kept: dict[str, Any] = {}
    if file is not None:
        with Image.open(file) as original:
            if original.has_transparency_data:
                alpha = original.convert("RGBA").getchannel("A")
                picture.putalpha(to_pil_image(Canonical(poison.size)(alpha)[:1]))
            profile = original.info.get("icc_profile")
            if profile and profile[16:20] == b"RGB ":  # that of a grey or CMYK picture does not fit
                kept["icc_profile"] = profile
            turned = original.getexif().get(ORIENTATION, 1)
        if turned != 1:
            picture.getexif()[ORIENTATION] = turned
            picture = ImageOps.exif_transpose(picture)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.partial")
    picture.save(partial, "PNG", **kept)
    partial.replace(path)


def _is_animated(file: Path) -> bool:
    try:
        with Image.open(file) as picture:
            # A JPEG of a phone may hold a preview (MPO); its first picture is the picture.
            return picture.format != "MPO" and getattr(picture, "n_frames", 1) > 1
    except UNREADABLE:
        return False


def _size(file: Path) -> tuple[int, int]:
    with Image.open(file) as picture:
        return picture.height, picture.width


def _distinct(names: list[Path]) -> list[Path]:
    """Return names of PNG files, no two the same: where endings alone differ, they are kept."""
    taken = {str(name).lower() for name in names if name.suffix.lower() == ".png"}
    found = []
    for name in names:
        chosen = name.with_suffix(".png")
        if name.suffix.lower() != ".png":
            longer = name
            while str(chosen).lower() in taken:
                chosen = longer = longer.with_name(f"{longer.name}.png")
            taken.add(str(chosen).lower())
        found.append(chosen)
    return found


def _dataset(poison_file: Path, data: Path | None, by_class: bool) -> Any:
    if data is not None:
        return load("custom", data, no_labels=not by_class)[0]
    run = run_in(poison_file.parent)
    cfg = run.configuration()
    if cfg is None:
        raise UserError(
            f"there is no {CONFIG_FILE} beside the poison, so its data set is not known; give the "
            "folder of clean images with --data DIR."
        )
    return run.training_images(cfg)


def _relative_names(dataset: Any, known: Any, names: tuple[str, ...] | None) -> Iterator[Path]:
    root = getattr(dataset, "root", None)
    for row in range(len(dataset)):
        file = file_of(dataset, row)
        if file is not None and root is not None:
            yield Path(file).relative_to(root)
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
