"""A small denoiser as a purifier: trained on clean images, it takes noise and poisons for noise."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from cp_plugin.config.defences import PurifyConfig
from cp_plugin.config.settings import UserError
from cp_plugin.data import Photos, load
from cp_plugin.defences.precomputed import canonical_images
from cp_plugin.util.whole_files import written_whole

log = logging.getLogger("cp_plugin")

FORMAT = "cp-plugin denoiser 1"
SIDE = 32
"""Of the squares that it is trained on, in pixels; smaller images are padded."""
CHANNELS = 3
UNIT = 1 / 16
"""Pixels that one unit of the network's output stands for: noise and poisons are small, and Adam's
steps are as long for small outputs as for large ones."""
LARGEST = 1 << 10
"""Layers and channels that a file may ask for."""


class Denoiser(nn.Module):
    """Convolutions that tell the noise of an image, which is then taken off.

    The network of DnCNN (Zhang et al., "Beyond a Gaussian Denoiser", TIP 2017): convolution and
    ReLU, then convolutions with batch normalisation and ReLU, then a convolution to the colours.

    Shape:
        uint8 (3, H, W) or (B, 3, H, W) to the same.
    """

    def __init__(self, depth: int, width: int) -> None:
        """Build it.

        Args:
            depth: convolutions, two at least.
            width: channels between them.
        """
        super().__init__()
        self.depth, self.width = depth, width
        layers: list[nn.Module] = [nn.Conv2d(CHANNELS, width, 3, padding=1), nn.ReLU()]
        for _ in range(depth - 2):
            layers += [nn.Conv2d(width, width, 3, padding=1, bias=False), nn.BatchNorm2d(width)]
            layers.append(nn.ReLU())
        layers.append(nn.Conv2d(width, CHANNELS, 3, padding=1))
        self.noise = nn.Sequential(*layers)
        """From pixels in [0, 1] to their noise, in `UNIT`s."""

    def forward(self, images: Tensor) -> Tensor:
        """Return the images without their noise, rounded and clipped."""
        batch = images if images.ndim == 4 else images[None]
        clean = self.clean(batch.float() / 255)
        return clean.mul(255).round().clamp(0, 255).to(torch.uint8).view_as(images)

    def clean(self, noisy_BCHW: Tensor) -> Tensor:
        """Return float images in [0, 1] without the noise that the network tells, not clipped."""
        found: Tensor = noisy_BCHW - UNIT * self.noise(noisy_BCHW)
        return found

    def save(self, path: Path) -> Path:
        """Write weights and shape as safetensors, whole or not at all."""
        shape = {"format": FORMAT, "depth": json.dumps(self.depth), "width": json.dumps(self.width)}
        tensors = {name: value.contiguous() for name, value in self.state_dict().items()}
        with written_whole(path) as partial:
            save_file(tensors, partial, shape)
        return path

    @classmethod
    def read(cls, path: Path) -> Denoiser:
        """Read what `save` wrote, in eval mode.

        Raises:
            UserError: the file is missing, damaged or something else.
        """
        if not path.is_file():
            raise UserError(f"there is no denoiser at {path}; give the file of defence.path.")
        try:
            with safe_open(path, "pt") as file:
                shape = file.metadata() or {}
                if shape.get("format") != FORMAT:
                    raise ValueError(f"its format is {shape.get('format')}, not {FORMAT}")
                depth, width = (int(shape[key]) for key in ("depth", "width"))
                if not (2 <= depth <= LARGEST and 1 <= width <= LARGEST):
                    raise ValueError(f"{depth} layers of {width} channels")
                names = file.keys()
                found = {name: tuple(file.get_slice(name).get_shape()) for name in names}
                with torch.device("meta"):  # no memory is taken for what the file lacks
                    planned = cls(depth, width).state_dict()
                if found != {name: tuple(value.shape) for name, value in planned.items()}:
                    raise ValueError(f"it has not the weights of {depth} layers, {width} channels")
                weights = {name: file.get_tensor(name) for name in names}
            if not all(bool(torch.isfinite(weight).all()) for weight in weights.values()):
                raise ValueError("weights are not finite")
            model = cls(depth, width)
            model.load_state_dict(weights)
        except (SafetensorError, KeyError, ValueError, RuntimeError, OSError) as error:
            reason = " ".join(str(error).split())[:200]
            raise UserError(
                f"{path} is no denoiser of cp-plugin, or it is damaged ({reason}); train one with "
                "defence.images=FOLDER."
            ) from error
        return model.eval()


def fitted_denoiser(
    config: PurifyConfig, device: torch.device | str, seed: int
) -> tuple[Denoiser, float]:
    """Return the denoiser of the settings, from its file or trained on clean images.

    Args:
        config: the settings.
        device: where it is trained.
        seed: used where the configuration has none.

    Returns:
        The denoiser, in eval mode on that device, and the seconds that training took.

    Raises:
        UserError: the file or the folder cannot be used.
    """
    if config.path is not None:
        return Denoiser.read(Path(config.path)).to(device), 0.0
    started = time.perf_counter()
    chosen = seed if config.seed is None else config.seed
    clean = Photos(train=True) if config.images is None else _folder(config.images)
    images = [image for _, image in canonical_images(clean, None)]
    model = train(images, config, device, chosen)
    seconds = time.perf_counter() - started
    log.info("denoiser: trained on %d clean images in %.1f s", len(images), seconds)
    if config.save is not None:
        model.save(Path(config.save))
    return model, seconds


def train(
    images: list[Tensor], config: PurifyConfig, device: torch.device | str, seed: int
) -> Denoiser:
    """Train a denoiser by Adam on squares of clean images under Gaussian noise.

    The deviation of each image's noise is drawn evenly from 0 to `config.std`, so that one network
    serves all (the blind denoiser of the paper).

    Args:
        images: uint8 (3, H, W) each.
        config: steps, batch size, learning rate, noise, depth and width.
        device: where it is trained.
        seed: of weights, squares and noise.
    """
    generator = torch.Generator().manual_seed(seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = Denoiser(config.depth, config.width).to(device)
    weights = list(model.parameters())
    optimizer = torch.optim.Adam(weights, lr=config.lr)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, config.steps)
    with torch.enable_grad():
        for clean in _squares(images, config, generator):
            deviation = config.std * torch.rand(len(clean), 1, 1, 1, generator=generator)
            noise = deviation * torch.randn(clean.shape, generator=generator)
            clean, noise = clean.to(device), noise.to(device)
            loss = (model.noise(clean + noise) - noise / UNIT).square().mean()
            for weight, gradient in zip(weights, torch.autograd.grad(loss, weights), strict=True):
                weight.grad = gradient
            optimizer.step()
            schedule.step()
    return model.eval()


def _squares(
    images: list[Tensor], config: PurifyConfig, generator: torch.Generator
) -> Iterator[Tensor]:
    """Yield batches of squares at random places, half of them mirrored, float in [0, 1]."""
    padded = [_at_least(image, SIDE) for image in images]
    for _ in range(config.steps):
        squares = []
        for number in torch.randint(len(padded), (config.batch_size,), generator=generator):
            image = padded[int(number)]
            limits = (side - SIDE + 1 for side in image.shape[1:])
            top, left = (int(torch.randint(limit, (), generator=generator)) for limit in limits)
            square = image[:, top : top + SIDE, left : left + SIDE]
            mirrored = bool(torch.randint(2, (), generator=generator))
            squares.append(square.flip(2) if mirrored else square)
        yield torch.stack(squares).float() / 255


def _at_least(image_CHW: Tensor, side: int) -> Tensor:
    height, width = image_CHW.shape[1:]
    missing = [0, max(0, side - width), 0, max(0, side - height)]
    if not any(missing):
        return image_CHW
    return nn.functional.pad(image_CHW.float(), missing, mode="replicate").to(torch.uint8)


def _folder(path: str) -> Any:
    """Return the images in a folder, classes or not."""
    return load("custom", path, no_labels=True)[0]
