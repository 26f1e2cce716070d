"""The poison file: delta, what it was made for, and how it is added to images.

A file is safetensors: tensor `delta` (K, C, H, W), for a sample poison tensor `keys` (K) too, and
plain text metadata. Loading runs no code. Images are matched by key (a hash of their pixels) or by
class name, never by position, so any loader and any order will do.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import cast

import torch
from torch import Tensor

from cp_plugin.attack.file_content import check_content
from cp_plugin.attack.key_index import KeyIndex
from cp_plugin.attack.perturbation import Perturbation
from cp_plugin.attack.row_file import RowFile
from cp_plugin.attack.tensor_file import read_by_rows, write_atomically
from cp_plugin.config.settings import Fit, Granularity, UserError, check_fit
from cp_plugin.data.fit import at_size, in_levels, keeping_grey
from cp_plugin.data.image import Size
from cp_plugin.data.labels import distinct
from cp_plugin.data.subset import keys_of_part

FORMAT = "1"
ATTACHED = "placement."
MEMBERS = "placement.members"
"""Attached tensor, int64 (N, 2): key and row of each image that a cluster poison was made on."""


@dataclass(frozen=True)
class Poison:
    """A crafted perturbation, ready to be saved or added to images."""

    perturbation: Perturbation
    granularity: Granularity
    keys: Tensor | None = None
    """int64 (K): for a sample poison, the image that each row belongs to."""
    classes: tuple[str, ...] | None = None
    """For a class poison, the class that each row belongs to."""
    info: Mapping[str, str] = field(default_factory=dict)
    """What it was made with: host, method, backbone, augmentations, schedule, seed, versions."""
    chosen: Tensor | None = None
    """int64 (M): for a class poison that is in a part of the images, the keys of these."""
    attached: Mapping[str, Tensor] = field(default_factory=dict)
    """Further tensors of the file, by names that begin with `placement.`: what tells the cluster of
    a new image (see `cp_plugin.engine.placement`)."""

    def __post_init__(self) -> None:
        """Check that every row has an owner.

        Raises:
            UserError: keys or class names are missing or of the wrong number.
        """
        check_fit(self.fit)
        owners = self.keys if self.granularity == "sample" else self.classes
        if owners is None or len(owners) != len(self.perturbation):
            found = "none" if owners is None else str(len(owners))
            raise UserError(
                f"expected {len(self.perturbation)} "
                f"{'keys' if self.granularity == 'sample' else 'class names'} for the rows, "
                f"got {found}; the poison file is incomplete."
            )

    @property
    def eps(self) -> float:
        """Largest change of a pixel, in [0, 1]."""
        return self.perturbation.eps

    @property
    def size(self) -> Size:
        """Height and width of delta in pixels; with `fit: crop` images are brought to it."""
        return self.perturbation.shape[1:]

    @property
    def fit(self) -> Fit:
        """How delta and images come together, see `cp_plugin.data.fit`."""
        return cast(Fit, self.info.get("fit", "crop"))

    @property
    def image_size(self) -> int:
        """Side of delta in pixels; of its width where it is no square, see `size`."""
        return self.size[1]

    def save(self, path: str | Path) -> Path:
        """Write the file atomically; an existing file is never overwritten.

        Raises:
            UserError: the file exists.
        """
        path = Path(path)
        if path.exists():
            raise UserError(
                f"{path} exists and a poison is never overwritten; choose another name."
            )
        rows = self.perturbation.rows
        tensors: dict[str, Tensor | RowFile] = {
            "delta": rows.contiguous() if isinstance(rows, Tensor) else rows
        }
        if self.keys is not None:
            tensors["keys"] = self.keys
        if self.chosen is not None:
            tensors["chosen"] = self.chosen
        tensors.update(self.attached)
        metadata = {
            **self.info,
            "format": FORMAT,
            "granularity": self.granularity,
            "eps": repr(self.eps),
            "image_size": str(self.image_size),
        }
        if self.classes is not None:
            metadata["classes"] = json.dumps(self.classes)
        write_atomically(path, tensors, metadata)
        return path

    @classmethod
    def load(cls, path: str | Path) -> Poison:
        """Read and check a poison file; the rows of a large one stay there until they are needed.

        Raises:
            UserError: the file is missing, truncated, of another format, or breaks its own budget.
        """
        found, metadata = read_by_rows(Path(path), "delta")
        if metadata.get("format") != FORMAT or "delta" not in found:
            raise UserError(
                f"{path} is no poison of format {FORMAT} (it has {metadata.get('format')}); "
                "`cp-plugin import` converts the authors' .pth files."
            )
        check_content(Path(path), found, metadata)
        tensors = {name: one for name, one in found.items() if isinstance(one, Tensor)}
        classes = metadata.get("classes")
        known = {"format", "granularity", "eps", "image_size", "classes"}
        return cls(
            Perturbation(found["delta"], float(metadata["eps"])),
            cast(Granularity, metadata["granularity"]),
            keys=tensors.get("keys"),
            classes=None if classes is None else distinct(json.loads(classes)),
            info={key: value for key, value in metadata.items() if key not in known},
            chosen=tensors.get("chosen"),
            attached={name: kept for name, kept in tensors.items() if name.startswith(ATTACHED)},
        )

    @cached_property
    def _row_of_key(self) -> KeyIndex:
        return KeyIndex(self.keys)

    @cached_property
    def _row_of_member(self) -> dict[int, int]:
        return dict(self.attached[MEMBERS].tolist()) if MEMBERS in self.attached else {}

    @cached_property
    def _chosen_keys(self) -> frozenset[int]:
        return frozenset(cast(Tensor, self.chosen).tolist())

    @cached_property
    def _row_of_class(self) -> dict[str, int]:
        return {name: row for row, name in enumerate(self.classes or ())}

    def rows(
        self, keys: Sequence[int] | None = None, classes: Sequence[str | None] | None = None
    ) -> Tensor:
        """Return the row of each image, int64, -1 where the poison has none for it.

        Args:
            keys: the images' keys; a class poison needs them only where it is in a part of the
                images, and without them tells the rows of all.
            classes: the images' class names, None for unlabelled ones; used by a class poison, for
                images that it does not know by their keys.
        """
        if self.granularity == "sample":
            return self._row_of_key.find(torch.tensor(keys or (), dtype=torch.int64))
        names, members = self._row_of_class, self._row_of_member
        found = [-1 if name is None else names.get(name, -1) for name in classes or ()]
        if MEMBERS in self.attached and keys is not None:
            found = found or [-1] * len(keys)
            found = [members.get(key, row) for key, row in zip(keys, found, strict=True)]
        if self.chosen is not None and keys is not None:
            pairs = zip(found, keys, strict=True)
            found = [row if key in self._chosen_keys else -1 for row, key in pairs]
        return torch.tensor(found, dtype=torch.int64)

    @property
    def fraction(self) -> float:
        """Part of the images that it was made for or cut down to."""
        return float(self.info.get("fraction", 1))

    @property
    def images(self) -> int | None:
        """Different images that `fraction` is a part of; None in older files."""
        count = self.info.get("images")
        return None if count is None else int(count)

    @property
    def owned_keys(self) -> Tensor | None:
        """Keys of the images that carry it, int64; None for a poison that whole classes carry."""
        if self.granularity == "sample":
            return self.keys
        if self.chosen is None and MEMBERS in self.attached:
            return self.attached[MEMBERS][:, 0]
        return self.chosen

    @property
    def needs_labels(self) -> bool:
        """Whether class names alone tell which row an image gets.

        A poison of clusters was made without labels and knows its images by their keys.
        """
        return self.granularity == "class" and MEMBERS not in self.attached

    def part(
        self,
        fraction: float,
        keys_N: Tensor,
        labels_N: Tensor | None,
        classes: Sequence[str] | None = None,
    ) -> Poison:
        """Return the poison for a part of its images, see `keys_of_part`.

        The choice is in the file as the rows' keys, or as `chosen`.

        Args:
            fraction: in (0, 1]; of the images that the poison is in.
            keys_N: int64 (N), the keys of the data set's images.
            labels_N: int64 (N), negative where unlabelled; None where there are no labels.
            classes: the names that the labels number; None: the poison's own.
        """
        own_names = self.classes if classes is None else classes
        labels = torch.zeros_like(keys_N) if labels_N is None else labels_N
        names = [own_names[y] if own_names and y >= 0 else None for y in labels.tolist()]
        carry = self.rows(keys_N.tolist(), names) >= 0
        chosen = keys_of_part(keys_N[carry], labels[carry], fraction)
        # Unlabelled images carry no class poison by design, so they are not counted.
        known = labels >= 0 if self.needs_labels else torch.ones_like(carry)
        count = len(torch.unique(keys_N[known]))
        info = {**self.info, "fraction": repr(len(chosen) / count), "images": str(count)}
        if self.granularity == "class":
            return replace(self, info=info, chosen=chosen)
        own = self.perturbation.selected(self._row_of_key.find(chosen))
        return replace(self, perturbation=own, keys=chosen, info=info)

    def check_classes(self, classes: Sequence[str] | None) -> None:
        """Check that a class poison has a delta for each of these classes, by name, in any order.

        A poison that knows its images by their keys fits any.

        Raises:
            UserError: the data set has no classes, or others.
        """
        if not self.needs_labels:
            return
        if classes is None:
            raise UserError(
                "a class poison needs labelled images and this data set has no labels; "
                "use labelled data or a sample poison (+poison=cp)."
            )
        unknown = [name for name in classes if name not in self._row_of_class]
        if unknown:
            raise UserError(
                f"the poison was made for {len(self.classes or ())} classes "
                f"({_some(self.classes or ())}), the data set has {len(classes)} "
                f"({_some(classes)}), and it has no delta for {_some(unknown)}; use the data set "
                "it was made for."
            )

    def offsets(self, rows_U: Tensor) -> Tensor:
        """Return rows in 8-bit levels, int16 (U, C, H, W), at most floor(255 eps) each."""
        return in_levels(self.perturbation.gather(rows_U), self.eps).short()

    def apply(self, images_BCHW: Tensor, rows_B: Tensor) -> Tensor:
        """Add rows to 8-bit images.

        Args:
            images_BCHW: uint8, of the poison's size; with `fit: cover` of any one size.
            rows_B: int64 as `rows` returns them; -1 leaves an image as it is.

        Returns:
            uint8 (B, C, H, W); no pixel is off by more than floor(255 eps).

        Raises:
            UserError: the images are not 8 bit, or not of the poison's size.
        """
        expected = self.perturbation.shape
        if self.fit == "cover" and images_BCHW.dtype == torch.uint8:
            delta = keeping_grey(self.perturbation.gather(rows_B), images_BCHW)
            height, width = images_BCHW.shape[2:]
            levels = in_levels(at_size(delta, (height, width)), self.eps)
            return levels.add_(images_BCHW).clamp_(0, 255).to(torch.uint8)
        if images_BCHW.dtype != torch.uint8 or tuple(images_BCHW.shape[1:]) != expected:
            raise UserError(
                f"expected uint8 images of shape {expected}, got {images_BCHW.dtype} "
                f"{tuple(images_BCHW.shape[1:])}; bring the images to canonical form with "
                f"Canonical({self.size}) first."
            )
        return self.offsets(rows_B).add_(images_BCHW).clamp_(0, 255).to(torch.uint8)


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:3]) + (", …" if len(names) > 3 else "")
