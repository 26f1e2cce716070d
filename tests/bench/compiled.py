"""Whole steps of a surrogate on a processor, with Numba's kernels in the mirror and without.

    python -m tests.bench.compiled [--network NAME] [--size PIXELS] [--repeats N]

A noise step and a model step of SimCLR in float32, one thread, by turns: by the small network of
the studies or by the paper's ResNet-18, with the paper's augmentations and with crops and flips
alone. What counts is the whole step, the network's part included.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from cp_plugin.apps.hydra_app import compose
from cp_plugin.attack.loop import Attack
from cp_plugin.attack.perturbation import Perturbation
from cp_plugin.attack.rows import Rows
from cp_plugin.config.settings import CraftConfig
from cp_plugin.data import Photos, RawDataset
from cp_plugin.engine.methods import build_method
from cp_plugin.engine.pipeline import build_pipeline
from cp_plugin.engine.settings import complete
from cp_plugin.hosts.lightning import LightningHost
from cp_plugin.mirror import mirror, processor
from tests.bench.provenance import interleaved, provenance, write

BATCH, ROWS, EPS = 64, 2400, 8 / 255
NETWORKS = {
    "studies": ("+backbone.kwargs.stem_stride=2",),
    "resnet18": ("~backbone.kwargs",),
}
AUGMENTATIONS = {"the paper's": (), "crops and flips": ("augmentations=crops",)}


def steps(settings: tuple[str, ...], size: int) -> dict[str, Callable[[], Any]]:
    """Return a noise step and a model step, always on the same batch."""
    cfg = complete(compose("simclr", [*settings, f"augmentations.0.crop_size={size}"]))
    photos = Photos(True, size, transform=build_pipeline(cfg), patches=-(-ROWS // 12))
    raw = RawDataset(photos, size)
    batch = raw.collate([raw[row * (len(raw) // BATCH)] for row in range(BATCH)])
    module = build_method(cfg, size)
    host = LightningHost(module, raw.with_views)
    perturbation = Perturbation.uniform(len(raw), (3, size, size), EPS, "float16")
    rows = Rows.of_samples(torch.ones(len(raw), dtype=torch.bool))
    attack = Attack(
        host, mirror(photos.transform), perturbation, rows, CraftConfig(pgd_steps=1), seed=0
    )

    def model_step() -> None:
        module.zero_grad()
        loss = host.loss(attack.views(batch, 0), batch)
        assert isinstance(loss, Tensor)
        loss.backward()

    return {"noise": lambda: list(attack.noise_phase([batch], 0)), "model": model_step}


def without(run: Callable[[], Any]) -> Callable[[], Any]:
    """Return a function as it is where Numba is not installed."""

    def plain() -> None:
        installed = processor._installed
        processor._installed = lambda compiler: False  # type: ignore[assignment]
        try:
            run()
        finally:
            processor._installed = installed

    return plain


def measure(network: str, size: int, repeats: int) -> dict[str, Any]:
    """Return the result: a row an augmentation and step."""
    found = []
    for augmentation, more in AUGMENTATIONS.items():
        for step, run in steps((*NETWORKS[network], *more), size).items():
            times = interleaved({"compiled": run, "plain": without(run)}, repeats)
            row = {
                "network": network,
                "augmentations": augmentation,
                "step": step,
                "milliseconds": times,
                "plain_over_compiled": times["plain"]["median"] / times["compiled"]["median"],
                "plain_over_compiled_cpu": times["plain"]["cpu"] / times["compiled"]["cpu"],
            }
            found.append(row)
            print(augmentation, step, {k: round(v["cpu"]) for k, v in times.items()})
    return {
        "provenance": provenance(["torch", "torchvision", "timm", "lightly", "numba"]),
        "what": f"SimCLR, float32, batch {BATCH} of {size} pixels",
        "rows": found,
    }


def main() -> None:
    """Measure and write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--network", choices=NETWORKS, default="studies")
    parser.add_argument("--size", type=int, default=32, help="of the images, pixels")
    parser.add_argument("--repeats", type=int, default=5)
    given = parser.parse_args()
    torch.set_num_threads(1)
    result = measure(given.network, given.size, given.repeats)
    print(write("compiled", result, "" if given.size == 32 else f"{given.size} pixels"))


if __name__ == "__main__":
    main()
