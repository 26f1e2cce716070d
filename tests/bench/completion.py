"""Matrix completion in batches against batched and single decompositions, to the same minimiser.

    python -m tests.bench.completion [--repeats N] [--threads N] [--former COMMIT]

All run the same steps (ADMM, one singular-value thresholding a step): by the Gram matrices of the
whole batch, by `torch.linalg.svd` of the whole batch, and an image at a time by `numpy.linalg.svd`;
with COMMIT also by the `lowrank.py` of that commit. How far they are from the minimiser is told by
many more steps in float64.
"""

from __future__ import annotations

import argparse
import subprocess
from collections.abc import Callable
from typing import Any
from unittest import mock

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from cp_plugin.config.defences import MatrixCompletionConfig
from cp_plugin.data import Photos
from cp_plugin.defences import lowrank
from cp_plugin.defences.lowrank import OVERRELAXED, THRESHOLD, complete, soft_threshold
from tests.bench.provenance import interleaved, provenance, write

BATCH = 256
EPOCH = 50_000
"""Images of the epoch whose cost is stated (CIFAR-10)."""
REFERENCE_STEPS = 600
REFERENCE_IMAGES = 32

Array = NDArray[np.float32]


def matrices_of_photos() -> tuple[Tensor, Tensor]:
    """Return 256 images of 32x32 pixels as matrices 32 x 96, and half of their pixels as kept."""
    photos = Photos(train=True, patches=-(-BATCH // 12))
    images = torch.from_numpy(photos.data[:BATCH]).float() / 255
    matrices = images.permute(0, 1, 3, 2).reshape(BATCH, 32, 96)
    return matrices, torch.rand(matrices.shape, generator=torch.Generator().manual_seed(0)) < 0.5


def thresholded(matrix: Array, threshold: float) -> Array:
    """Soft-threshold the singular values of one matrix."""
    left, values, right = np.linalg.svd(matrix, full_matrices=False)
    product: Array = (left * np.maximum(values - threshold, 0)) @ right
    return product


def complete_in_numpy(
    matrix: Array, kept: NDArray[np.bool_], shrinkage: float, steps: int
) -> Array:
    """Complete one matrix as `complete` does, by singular value decompositions."""
    known = np.where(kept, matrix, np.float32(0))
    threshold = np.float32(THRESHOLD * np.linalg.norm(known) / np.sqrt(kept.mean()))
    pull = np.float32(shrinkage) / threshold
    target = known / (1 + pull)
    stay = np.where(kept, pull / (1 + pull), np.float32(1))
    low_rank = estimate = known
    dual = np.zeros_like(known)
    for _ in range(steps):
        low_rank = thresholded(estimate - dual, float(threshold))
        dual = dual + OVERRELAXED * low_rank + (1 - OVERRELAXED) * estimate
        estimate = target + stay * dual
        dual = dual - estimate
    return low_rank


def thresholded_by_svd(matrices: Tensor, threshold: Tensor) -> Tensor:
    """Soft-threshold the singular values of a batch of matrices."""
    left, values, right = torch.linalg.svd(matrices, full_matrices=False)
    shrunk: Tensor = (left * (values[:, None] - threshold).clamp(min=0)) @ right
    return shrunk


def complete_by_svd(matrices: Tensor, kept: Tensor, shrinkage: float, steps: int) -> Tensor:
    """Complete matrices as `complete` does, by batched singular value decompositions."""
    with mock.patch.object(lowrank, "soft_threshold", thresholded_by_svd):
        return complete(matrices, kept, shrinkage, steps)


def complete_of(commit: str) -> Callable[..., Tensor]:
    """Return `complete` as it was at a commit."""
    path = f"{commit}:cp_plugin/defences/lowrank.py"
    text = subprocess.run(["git", "show", path], capture_output=True, text=True, check=True).stdout
    module: dict[str, Any] = {"__name__": f"lowrank_{commit}"}
    exec(compile(text, path, "exec"), module)
    former: Callable[..., Tensor] = module["complete"]
    return former


def measure(repeats: int, former: str | None) -> dict[str, Any]:
    """Return the result: times of a step and of a completion, agreement, the cost of an epoch."""
    config = MatrixCompletionConfig()
    matrices, kept = matrices_of_photos()
    shrinkage, steps = config.shrinkage, config.iterations
    singles = list(zip(matrices.numpy(), kept.numpy(), strict=True))
    threshold = THRESHOLD * torch.linalg.matrix_norm(matrices)[:, None, None]
    cuts = threshold.flatten().tolist()
    found: dict[str, Tensor] = {}

    def by(complete: Callable[..., Tensor], name: str) -> None:
        found[name] = complete(matrices, kept, shrinkage, steps)

    def looped() -> None:
        results = [complete_in_numpy(m, k, shrinkage, steps) for m, k in singles]
        found["loop"] = torch.from_numpy(np.stack(results))

    step = interleaved(
        {
            "gram": lambda: soft_threshold(matrices, threshold),
            "svd": lambda: thresholded_by_svd(matrices, threshold),
            "numpy": lambda: [
                thresholded(m, cut) for (m, _), cut in zip(singles, cuts, strict=True)
            ],
        },
        3 * repeats,
    )
    ways: dict[str, Callable[[], None]] = {
        "gram": lambda: by(complete, "batch"),
        "svd": lambda: by(complete_by_svd, "svd"),
        "numpy": looped,
    }
    if former is not None:
        earlier = complete_of(former)
        ways[former] = lambda: by(earlier, former)
    whole = interleaved(ways, repeats)
    part = slice(0, None, BATCH // REFERENCE_IMAGES)
    best = complete(matrices[part].double(), kept[part], shrinkage, REFERENCE_STEPS)
    an_epoch = {
        name: times["median"] / 1e3 * EPOCH / BATCH * config.completions
        for name, times in whole.items()
    }
    return {
        "provenance": provenance(["torch", "numpy"]),
        "what": f"{BATCH} images of 32x32 pixels, half kept, shrinkage {shrinkage}, {steps} steps",
        "config": vars(config),
        "step_ms": step,
        "completion_ms": whole,
        "times": {name: whole[name]["median"] / whole["gram"]["median"] for name in whole},
        "times_cpu": {name: whole[name]["cpu"] / whole["gram"]["cpu"] for name in whole},
        "largest_difference": _largest(found["batch"] - found["loop"]),
        "largest_difference_from_the_minimiser": _largest(found["batch"][part] - best),
        "mean_difference_from_the_minimiser": float((found["batch"][part] - best).abs().mean()),
        "completions_of_a_data_set_seconds": an_epoch,
        "images_of_that_data_set": EPOCH,
    }


def _largest(difference: Tensor) -> float:
    return float(difference.abs().max())


def main() -> None:
    """Measure, write the JSON, print the lines that matter."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--former", help="a commit whose `complete` is timed too")
    parser.add_argument("--dry", action="store_true", help="write nothing")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    result = measure(arguments.repeats, arguments.former)
    if not arguments.dry:
        print(write("completion", result))
    for name in ("gram", "svd", "numpy"):
        step, whole = result["step_ms"][name], result["completion_ms"][name]
        epoch = result["completions_of_a_data_set_seconds"][name]
        print(
            f"{name:9} a step {step['median']:6.1f} ms, completing {whole['median']:7.0f} ms, "
            f"{result['config']['completions']} completions of {EPOCH} images {epoch:6.0f} s"
        )
    print("times the clock:", {name: round(times, 2) for name, times in result["times"].items()})
    print("times the work:", {name: round(times, 2) for name, times in result["times_cpu"].items()})
    for key in ("largest_difference", "largest_difference_from_the_minimiser"):
        print(f"{key.replace('_', ' ')}: {result[key]:.1e}")


if __name__ == "__main__":
    main()
