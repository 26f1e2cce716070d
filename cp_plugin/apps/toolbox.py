"""Contrastive poisoning as an attack of the Adversarial Robustness Toolbox: arrays in, arrays out.

Needs the extra `art` (`pip install "cp-plugin[art]"`).
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from art.attacks.attack import PoisoningAttackBlackBox
from numpy.typing import NDArray
from PIL import Image

from cp_plugin.apps.hydra_app import compose, pretrain
from cp_plugin.apps.study.cell import quoted
from cp_plugin.attack.poison_file import Poison
from cp_plugin.config.settings import UserError
from cp_plugin.data import image_key
from cp_plugin.util.run_files import POISON_FILE


class ContrastivePoisoning(PoisoningAttackBlackBox):  # type: ignore[misc]
    """Images that a model cannot usefully be pretrained on without labels.

    The surrogate is trained by the embedded engine; every configuration and every poison that
    `cp-plugin pretrain` takes can be named.

    Source:
        He, Zha, Katabi: Indiscriminate Poisoning Attacks on Unsupervised Contrastive Learning,
        ICLR 2023.

    Example:
        >>> attack = ContrastivePoisoning(overrides=["poison.rounds=100"])
        >>> x_poisoned, y = attack.poison(x_train, y_train)
        >>> attack.crafted.save("poison.safetensors")
    """

    attack_params: ClassVar[list[str]] = [
        *PoisoningAttackBlackBox.attack_params,
        *("group", "config_name", "overrides", "clip_values", "channels_first"),
    ]
    _estimator_requirements = ()

    def __init__(
        self,
        group: str = "cp",
        config_name: str = "simclr",
        overrides: Sequence[str] = (),
        clip_values: tuple[float, float] = (0.0, 1.0),
        channels_first: bool = True,
    ) -> None:
        """Choose the poison and its surrogate.

        Args:
            group: of the poison, as after `+poison=`: `cp` (a perturbation an image), `cp_class`.
            config_name: the surrogate's configuration: `simclr`, `mocov2plus`, `byol`, …
            overrides: of the configuration, as on the command line: `poison.eps=4/255`, `seed=1`.
            clip_values: least and largest value of a pixel.
            channels_first: whether images are (N, C, H, W), or else (N, H, W, C).

        Raises:
            ValueError: a value that cannot be used.
        """
        super().__init__()
        self.group, self.config_name, self.overrides = group, config_name, overrides
        self.clip_values, self.channels_first = clip_values, channels_first
        self.crafted: Poison | None = None
        """The poison of the last call; it can be saved as long as the attack is there."""
        self._check_params()

    def poison(
        self, x: NDArray[Any], y: NDArray[Any] | None = None, **kwargs: Any
    ) -> tuple[NDArray[Any], NDArray[Any] | None]:
        """Craft a poison for images and add it.

        Images are what their 8-bit rounding is to the surrogate; what is returned is the given
        image plus delta, whose levels are whole ones of 8 bit.

        Args:
            x: float or uint8, of three channels and one size, see `channels_first`.
            y: labels, int (N) or one-hot (N, K); a poison of classes needs them.
            kwargs: none is known.

        Returns:
            The poisoned images, of the given type and shape, and the given labels.

        Raises:
            ValueError: the arrays do not fit, or values lie outside `clip_values`.
            UserError: the configuration or the number of images cannot be used.
        """
        if kwargs:
            raise ValueError(f"{next(iter(kwargs))} is not an argument of poison; give x and y.")
        images, labels = self._in_bytes(x), _numbers(y, len(x))
        # Rows of a large poison are read from its file when they are asked for.
        self._folder = tempfile.TemporaryDirectory()
        self.crafted = self._craft(images, labels, Path(self._folder.name))
        names = None if labels is None else [str(label) for label in labels]
        rows = self.crafted.rows([image_key(image) for image in images], names)
        low, high = self.clip_values
        if tuple(images.shape[2:]) != self.crafted.size:
            raise UserError(
                f"the images have {images.shape[2]} x {images.shape[3]} pixels and the poison "
                "{} x {}; leave poison.image_size out.".format(*self.crafted.size)
            )
        delta = self.crafted.offsets(rows).numpy() / 255 * (high - low)
        moved = np.clip(x + (delta if self.channels_first else np.moveaxis(delta, 1, 3)), low, high)
        return (np.rint(moved) if x.dtype == np.uint8 else moved).astype(x.dtype), y

    def _craft(self, images: torch.Tensor, labels: NDArray[Any] | None, folder: Path) -> Poison:
        for row, image in enumerate(images.permute(0, 2, 3, 1).numpy()):
            place = folder / "images" / ("all" if labels is None else str(labels[row]))
            place.mkdir(parents=True, exist_ok=True)
            Image.fromarray(image).save(place / f"{row:08d}.png")
        cfg = compose(
            self.config_name,
            [
                "data.dataset=custom",
                f"data.train_path={quoted(folder / 'images')}",
                f"data.no_labels={labels is None}",
                f"checkpoint.dir={quoted(folder / 'runs')}",
                f"+poison={self.group}",
                *self.overrides,
            ],
        )
        made = Path(pretrain(cfg)["folder"]) / POISON_FILE
        shutil.rmtree(folder / "images")
        return Poison.load(made)

    def _in_bytes(self, x: NDArray[Any]) -> torch.Tensor:
        """Return images as uint8 (N, 3, H, W)."""
        low, high = self.clip_values
        if x.ndim != 4 or x.shape[1 if self.channels_first else 3] != 3:
            wanted = "(N, 3, H, W)" if self.channels_first else "(N, H, W, 3)"
            raise ValueError(f"images of shape {x.shape}, expected {wanted}; see channels_first.")
        if x.min() < low or x.max() > high:
            raise ValueError(
                f"pixels between {x.min():g} and {x.max():g}, expected {low:g} to {high:g}; see "
                "clip_values."
            )
        first = x if self.channels_first else np.moveaxis(x, 3, 1)
        return torch.from_numpy(np.rint((first - low) / (high - low) * 255.0).astype(np.uint8))

    def _check_params(self) -> None:
        if len(self.clip_values) != 2 or self.clip_values[0] >= self.clip_values[1]:
            raise ValueError(f"clip_values of {self.clip_values}, expected (least, largest).")


def _numbers(y: NDArray[Any] | None, count: int) -> NDArray[Any] | None:
    """Return labels as numbers, int (N)."""
    if y is None:
        return None
    if y.ndim not in (1, 2) or len(y) != count:
        raise ValueError(f"labels of shape {y.shape} for {count} images; give (N) or (N, K).")
    return y.argmax(1) if y.ndim == 2 else y.astype(np.int64)
