"""One sample-wise noise step against its floor, and against the authors' code.

    python -m tests.bench.step [--precision 32|bf16] [--official DIR] [--batch N] [--rows N]

ResNet-18 with a CIFAR stem, the paper's CIFAR augmentations, T = 1. A step is one of a phase of 8:
what entering and leaving a phase costs is spread over them (the paper's phases have 20 steps, or an
epoch's). The floor is the network alone:
forward and backward to its input, weights frozen, eval mode, both views, same precision, same run;
for MoCo and BYOL with the momentum network's. DIR is a copy of kaiwenzha/contrastive-poisoning: its
model, loss and dense perturbation take the step that its training loop takes, anomaly detection on.
"""

from __future__ import annotations

import argparse
import resource
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from cp_plugin.apps.hydra_app import compose
from cp_plugin.attack.loop import Attack
from cp_plugin.attack.perturbation import Perturbation
from cp_plugin.attack.rows import Rows
from cp_plugin.config.settings import CraftConfig
from cp_plugin.data import Photos, RawDataset
from cp_plugin.data.batch import Batch
from cp_plugin.engine.methods import build_method
from cp_plugin.engine.pipeline import build_pipeline
from cp_plugin.engine.settings import complete
from cp_plugin.hosts.lightning import LightningHost
from cp_plugin.mirror import mirror
from tests.bench.provenance import interleaved, provenance, write

SIZE, EPS = 32, 8 / 255
PHASE = 8
"""Steps that are timed as one."""
METHODS = ("simclr", "mocov2plus", "byol")
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
ENCODERS = {
    "simclr": (("backbone", "projection_head"),),
    "mocov2plus": (
        ("backbone", "projection_head"),
        ("backbone_momentum", "projection_head_momentum"),
    ),
    "byol": (
        ("backbone", "projection_head", "prediction_head"),
        ("backbone_momentum", "projection_head_momentum"),
    ),
}
"""The networks of each branch, in the order in which they are run."""


Cast = Callable[[], AbstractContextManager[Any]]
PRECISIONS: dict[str, Cast] = {
    "32": nullcontext,
    "bf16": lambda: torch.autocast(DEVICE.type, torch.bfloat16),  # as precision=bf16-mixed does
}


def batches(raw: RawDataset, size: int) -> Batch:
    """Return the first images of the data set."""
    step = max(1, len(raw) // size)
    batch = raw.collate([raw[row] for row in range(0, size * step, step)])
    return batch._replace(images=batch.images.to(DEVICE))


def noise_phase(
    method: str, raw: RawDataset, rows: int, batch: Batch, cast: Cast
) -> tuple[Any, Callable[[], Any]]:
    """Return the module of a method, and a noise phase of it, always on the same batch."""
    cfg = complete(compose(method, ["~backbone.kwargs"]))
    module = build_method(cfg, SIZE).to(DEVICE)
    host = LightningHost(module, raw.with_views, precision=cast)
    perturbation = Perturbation.uniform(rows, (3, SIZE, SIZE), EPS, "float16")
    perturbation.move(DEVICE)
    own = Rows.of_samples(torch.ones(rows, dtype=torch.bool))
    config = CraftConfig(pgd_steps=1)
    attack = Attack(host, mirror(build_pipeline(cfg)).to(DEVICE), perturbation, own, config, seed=0)
    return module, lambda: list(attack.noise_phase([batch] * PHASE, 0))


def floor(module: Any, method: str, size: int, cast: Cast) -> Callable[[], Any]:
    """Return the bare pass through the branches, forward and backward to the input."""
    shape = (2 * size, 3, SIZE, SIZE)
    images = torch.rand(shape, device=DEVICE).contiguous(memory_format=torch.channels_last)

    def run() -> None:
        before = {name: weight.requires_grad for name, weight in module.named_parameters()}
        module.eval().requires_grad_(False)
        x = images.clone().requires_grad_()
        with cast():
            total = sum(through(module, names, x).float().sum() for names in ENCODERS[method])
        torch.autograd.grad(total, x)  # type: ignore[arg-type]
        for name, weight in module.named_parameters():
            weight.requires_grad_(before[name])
        module.train()

    return run


def through(module: Any, names: tuple[str, ...], x: Tensor) -> Tensor:
    """Run networks one after the other."""
    for name in names:
        x = getattr(module, name)(x)
    return x


def official_step(folder: Path, rows: int, batch: Batch) -> Callable[[], Any]:
    """Return the SimCLR noise step of the authors' training loop."""
    sys.path.insert(0, str(folder))
    from losses import SimCLRLoss
    from model import AttackModel

    settings = SimpleNamespace(
        cl_alg="SimCLR",
        baseline=False,
        classwise=False,
        samplewise=True,
        pretrained_delta="",
        dataset_size=rows,
        n_cls=10,
        size=SIZE,
        local_rank=1,  # of 0 it prints
        delta_weight=EPS,
    )
    model = AttackModel("resnet18", "cifar10", settings).to(DEVICE).eval()
    for weight in model.backbone.parameters():
        weight.requires_grad = False
    criterion = SimCLRLoss(temperature=0.5)
    optimizer = torch.optim.Adam([model.delta])
    images, index = batch.images.float() / 255, batch.rows.to(DEVICE)

    def run() -> None:
        with torch.autograd.set_detect_anomaly(True, check_nan=True):
            optimizer.zero_grad()
            criterion(model(images, index)["features"]).backward()
        assert model.delta.grad is not None
        model.delta.data.add_(-0.1 * model.delta.grad.data.sign()).clamp_(-1, 1)

    return run


def measure(given: argparse.Namespace) -> dict[str, Any]:
    """Return the result: a row a method."""
    photos = Photos(train=True, patches=-(-given.rows // 12))
    cast, found = PRECISIONS[given.precision], []
    for method in METHODS:
        photos.transform = build_pipeline(complete(compose(method, ["~backbone.kwargs"])))
        raw = RawDataset(photos, SIZE)
        batch = batches(raw, given.batch)
        module, phase = noise_phase(method, raw, len(photos), batch, cast)
        runs = {"step": phase, "floor": floor(module, method, given.batch, cast)}
        if given.official is not None and method == "simclr":
            runs["official"] = official_step(given.official, len(photos), batch)
        times = interleaved(runs, given.repeats)
        times["step"] = {
            name: value if name == "n" else value / PHASE for name, value in times["step"].items()
        }
        seconds = {name: time["median"] / 1e3 for name, time in times.items()}
        cpu = {name: time["cpu"] / 1e3 for name, time in times.items()}
        theirs = seconds.get("official")
        found.append(
            {
                "phase": "noise",
                "method": method,
                "dual_branch": method != "simclr",
                "seconds": seconds["step"],
                "floor_seconds": seconds["floor"],
                "ratio_to_floor": seconds["step"] / seconds["floor"],
                "ratio_to_floor_cpu": cpu["step"] / cpu["floor"],
                "official_seconds": theirs,
                "ratio_to_official": None if theirs is None else theirs / seconds["step"],
                "milliseconds": times,
            }
        )
        print(method, {name: round(value, 3) for name, value in seconds.items()})
    return {
        "provenance": provenance(["torch", "torchvision", "timm", "lightly", "kornia", "numba"]),
        "what": f"ResNet-18, CIFAR stem, batch {given.batch}, {len(photos)} rows, sample-wise, "
        f"T 1, a step of a phase of {PHASE}, channels last",
        "precision": given.precision,
        "peak_memory_megabytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
        "rows": found,
    }


def main() -> None:
    """Measure and write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--precision", choices=PRECISIONS, default="bf16")
    parser.add_argument("--official", type=Path)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--rows", type=int, default=50_000)
    parser.add_argument("--repeats", type=int, default=5)
    given = parser.parse_args()
    print(write("step", measure(given), given.precision))


if __name__ == "__main__":
    main()
