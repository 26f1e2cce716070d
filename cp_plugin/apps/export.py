"""Poisons in and out: poisoned images as PNG files, the authors' `.pth` files as poisons."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterator
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
    image_key,
    labels,
    load,
    names_or_numbers,
)
from cp_plugin.data.image import Size
from cp_plugin.data.picture_files import distinct_names, inside, tell_left_out
from cp_plugin.data.picture_pixels import ORIENTATION, CannotProtect, ending, read, write
from cp_plugin.data.picture_pixels import add as change
from cp_plugin.data.raw_images import UNREADABLE
from cp_plugin.data.wrappers import file_of
from cp_plugin.util.provenance import versions
from cp_plugin.util.run_files import CONFIG_FILE
from cp_plugin.util.whole_files import clear_partial, sha256, write_text, written_whole

UNFINISHED = ".cp-plugin-export"
"""Lies in a folder while it is written, and names the poison: the same command goes on there."""


def export(poison_file: Path, out: Path, data: Path | None = None) -> int:
    """Write the poisoned images as PNG files, an image folder.

    Names are those of the images relative to their folder, with the ending `.png`, which follows
    the own one where two files differ by that only; images that are no files of their own are
    `<class>/<row>.png`. Transparency and the colour profile are kept, and pictures are upright.
    What has no row, cannot be read or is animated is left out and named in the log; what carries no
    perturbation, such as images outside the part that a poison is for, is written as it is and
    named too. An export that
    was interrupted goes on where it was. With `fit: cover` files keep their own size, mode, depth
    and orientation (see `cp_plugin.data.picture_pixels`).

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
    dataset = dataset_of(poison_file, data, by_class=poison.needs_labels)
    if poison.needs_labels or poison.fraction < 1:
        part(dataset, poison, 1.0)
    known, names = labels(dataset), names_or_numbers(dataset)
    add = AddPoison(poison, names if poison.needs_labels else None)
    left_out: dict[Path, str] = {}
    resized: dict[Path, str] = {}
    clean: dict[Path, str] = {}
    everything = poison.fraction == 1 and not poison.needs_labels
    covering = poison.fit == "cover"
    raw, skipped = _readable(dataset, None if covering else poison.size)
    written = 0
    relative = list(_relative_names(dataset, known, names))
    endings = [".png"] * len(relative)
    if covering:
        files = [Path(file_of(dataset, row) or name) for row, name in enumerate(relative)]
        endings = [ending(file, "png") for file in files]
    for row, name in enumerate(distinct_names(relative, endings)):
        file = file_of(dataset, row)
        source = Path(file or name)
        if file is not None and _is_animated(source):
            left_out[source] = "animated"
            continue
        if not (everything and (out / name).exists()):
            try:
                if row < skipped:
                    raise SampleError("unreadable")
                label = -1 if known is None else int(known[row])
                made = _at_own_size if covering else _at_size_of_poison
                save, changed = made(add, raw, row - skipped, label, file)
            except SampleError as error:
                missing = "no row" in str(error)
                left_out[source] = "the poison has no row for it" if missing else "unreadable"
                continue
            if not changed:
                clean[source] = "outside the poison" if label >= 0 or known is None else "no label"
            if not (out / name).exists():
                if not mark.is_file():
                    write_text(mark, sha256(poison_file))
                _write(inside(out, name), save)
        if not covering and file is not None and (size := _size(source)) != poison.size:
            resized[source] = f"{size[0]} x {size[1]}"
        written += 1
    if not written:
        raise UserError(
            f"the poison has no row for any of the {len(dataset)} images; use the data set it was "
            "made for."
        )
    mark.unlink(missing_ok=True)
    tell_left_out(out, left_out)
    tell_left_out(out, clean, "as they were, without a perturbation")
    tell_left_out(out, resized, "resized and cropped to {} x {}".format(*poison.size))
    return written


def _readable(dataset: Any, size: Size | None) -> tuple[RawDataset, int]:
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
    clear_partial(out)
    if not out.exists() or not any(out.iterdir()):
        return mark
    if not mark.is_file():
        raise UserError(f"{out} is not empty; give a new folder.")
    if mark.read_text(encoding="utf8") != sha256(poison_file):
        raise UserError(
            f"{out} holds an unfinished export of another poison; give a new folder, or delete it."
        )
    return mark


Save = Callable[[Path], None]
"""Writes a picture to a path."""
Made = tuple[Save, bool]
"""What writes a picture, and whether it carries a perturbation."""


def _write(path: Path, save: Save) -> None:
    with written_whole(path) as partial:
        save(partial)


def _at_own_size(add: AddPoison, raw: RawDataset, row: int, label: int, file: str | None) -> Made:
    """Return what writes an image as large as it is, and all that its file has.

    Raises:
        SampleError: it cannot be read, or the poison has no row for it.
    """
    poison = add.poison
    grid = Canonical(poison.size, poison.fit)
    if file is None:
        image = raw[row].image
        key = image_key(grid(image))
        made = to_pil_image(add(image, key, label))
        return lambda path: made.save(path, "PNG"), add.changes(key, label)
    try:
        picture, canonical = read(Path(file), grid)
    except CannotProtect as error:
        raise SampleError(str(error)) from error
    key = image_key(canonical)
    change(picture, add.row(key, label), poison.eps)
    return lambda path: write(picture, path), add.changes(key, label)


def _at_size_of_poison(
    add: AddPoison, raw: RawDataset, row: int, label: int, file: str | None
) -> Made:
    """Return what writes an image of the poison's size, and what its file has beside colours.

    Raises:
        SampleError: it cannot be read, or the poison has no row for it.
    """
    item = raw[row]
    picture = to_pil_image(add(item.image, item.key, label))
    kept: dict[str, Any] = {}
    if file is not None:
        with Image.open(file) as original:
            if original.has_transparency_data:
                alpha = original.convert("RGBA").getchannel("A")
                picture.putalpha(to_pil_image(Canonical(add.poison.size)(alpha)[:1]))
            profile = original.info.get("icc_profile")
            if profile and profile[16:20] == b"RGB ":  # that of a grey or CMYK picture does not fit
                kept["icc_profile"] = profile
            turned = original.getexif().get(ORIENTATION, 1)
        if turned != 1:
            picture.getexif()[ORIENTATION] = turned
            picture = ImageOps.exif_transpose(picture)
    return lambda path: picture.save(path, "PNG", **kept), add.changes(item.key, label)


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


def dataset_of(poison_file: Path, data: Path | None, by_class: bool) -> Any:
    """Return the clean images of a poison: those in a folder, or those of its own run.

    Args:
        poison_file: lies in the folder of its run, where no folder of images is given.
        data: a folder of images.
        by_class: whether its subfolders are classes.

    Raises:
        UserError: there is neither, or the images are not where they were.
    """
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
    except Exception as error:  # torch.load has no error class of its own for damaged files
        reason = str(error).splitlines()[0] if str(error) else "empty"
        raise UserError(f"{file} cannot be read as plain tensors ({reason}).") from error
    if isinstance(content, dict):
        model = content.get("model", content)
        content = model.get("delta", model.get("module.delta")) if isinstance(model, dict) else None
    if not isinstance(content, torch.Tensor) or content.ndim != 4:
        raise UserError(f"{file} holds no tensor `delta` of shape (K, C, H, W).")
    return content.detach().float()
