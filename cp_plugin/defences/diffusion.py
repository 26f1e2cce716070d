"""A diffusion model as a purifier: noise is added, and the model takes it off with the poison."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from cp_plugin.config.defences import DiffusionConfig
from cp_plugin.config.settings import UserError


class DiffusionPurifier(nn.Module):
    """Diffuse images up to a step, then denoise them from there (DiffPure; Nie et al., ICML 2022).

    The model is an unconditional one of pixels by `diffusers`, whose images are of its own size or
    of any that its network takes.

    Shape:
        uint8 (C, H, W) or (B, C, H, W) to the same.
    """

    def __init__(self, network: nn.Module, scheduler: Any, steps: int, seed: int) -> None:
        """Bind a model.

        Args:
            network: from noisy images in [-1, 1] and a step to an object with `sample`, as
                diffusers' UNet2DModel.
            scheduler: diffusers' DDPMScheduler of its training.
            steps: of noise that are added and taken off, less than the scheduler has.
            seed: of all noise.

        Raises:
            UserError: the scheduler has fewer steps.
        """
        super().__init__()
        known = int(scheduler.config.num_train_timesteps)
        if steps > known:
            raise UserError(
                f"defence.steps is {steps}, and the diffusion model was trained with {known}; set "
                "it to fewer."
            )
        scheduler.set_timesteps(known)
        self.network, self._scheduler, self._steps = network, scheduler, steps
        self._generator = torch.Generator().manual_seed(seed)

    @torch.no_grad()
    def forward(self, images: Tensor) -> Tensor:
        """Return the purified images, rounded and clipped."""
        batch = (images if images.ndim == 4 else images[None]).float() / 127.5 - 1
        noise = torch.randn(batch.shape, generator=self._generator).to(batch.device)
        last = torch.full((len(batch),), self._steps - 1, device=batch.device)
        current = self._scheduler.add_noise(batch, noise, last)
        for step in range(self._steps - 1, -1, -1):
            predicted = self.network(current, step).sample
            moved = self._scheduler.step(predicted, step, current, generator=self._generator)
            current = moved.prev_sample
        pixels: Tensor = (current + 1) * 127.5
        return pixels.round().clamp(0, 255).to(torch.uint8).view_as(images)


def diffusion_purifier(
    config: DiffusionConfig, device: torch.device | str, seed: int
) -> DiffusionPurifier:
    """Return the purifier of the settings, its weights read from the user's folder.

    Args:
        config: the settings.
        device: where it works.
        seed: used where the configuration has none.

    Raises:
        UserError: diffusers is not installed, or the folder is not that of such a model.
    """
    try:
        from diffusers import DDPMPipeline
    except ImportError as error:
        raise UserError(
            "defence=diffusion needs diffusers, which is not installed; pip install "
            "'cp-plugin[diffusion]'."
        ) from error
    if not Path(config.path).is_dir():
        raise UserError(
            f"there is no folder {config.path}; give that of an unconditional DDPM of pixels, as "
            "diffusers' save_pretrained writes it, by defence.path."
        )
    try:
        opened: Any = DDPMPipeline.from_pretrained  # diffusers gives it no types
        pipeline = opened(config.path, local_files_only=True, use_safetensors=True)
    except (OSError, ValueError, KeyError, TypeError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(
            f"{config.path} is no DDPM pipeline of diffusers with safetensors ({reason})."
        ) from error
    chosen = seed if config.seed is None else config.seed
    network = pipeline.unet.to(device).eval()
    return DiffusionPurifier(network, pipeline.scheduler, config.steps, chosen)
