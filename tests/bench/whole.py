"""Whole crafts and victims over the bare passes that they consist of, by pairs in one process.

    python -m tests.bench.whole [--rows NAME …] [--pairs N] [--precision P] [--tiny]

A run of the embedded engine is stopped after each round of a craft (M model steps, N noise steps)
or after as many steps of a victim, and the same number of bare passes is run on a copy of its
network: forward and backward with the optimiser's step for a model step, forward and backward to
the input in eval mode for a noise step, both views, same precision, same process. What is left out
of the bare passes is everything else: images, views, loss, rows of delta, hooks, trainer. Where the
rest goes is measured by clocks around the functions named in `CLOCKS`, in every other round: on a
GPU a clock waits for what is under way, which a run that nobody times does not. The first round
warms up.
`--tiny` shrinks every row, to see that all of it runs.
"""

from __future__ import annotations

import argparse
import copy
import functools
import resource
import statistics
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import torch
from lightning.pytorch import Callback
from PIL import Image
from torch.utils.data import DataLoader

from cp_plugin.apps.hydra_app import compose
from cp_plugin.attack.loop import Attack
from cp_plugin.attack.perturbation import Perturbation
from cp_plugin.data import RawDataset
from cp_plugin.data.photos import photograph
from cp_plugin.data.read_once import read_once
from cp_plugin.engine import run as engine
from cp_plugin.engine.optimisation import build_optimizer
from cp_plugin.engine.simclr import SimCLR
from cp_plugin.mirror import Mirror
from tests.bench.provenance import provenance, write
from tests.bench.step import ENCODERS, through

CLOCKS: dict[str, tuple[tuple[Any, str], ...]] = {
    "loader": ((torch.utils.data.dataloader._BaseDataLoaderIter, "__next__"),),
    "mirror": ((Mirror, "forward"),),
    "rows of delta": ((Attack, "_rows_of"), (Perturbation, "gather"), (Perturbation, "descend")),
    "backward": ((torch.autograd, "_engine_run_backward"),),
}
"""Functions whose time is taken, by the name of what they do; `forward and loss` is the module's
`training_step`, and `other` what is left: optimiser, trainer, hooks, state kept."""
FILES = 128
STEPS = 4
"""Model steps, and noise steps, of a round."""


class Row(NamedTuple):
    """What is trained and on what."""

    side: int
    batch: int
    overrides: tuple[str, ...]


SMALL = ("data=photos", "augmentations=crops", "optimizer.name=adamw", "optimizer.lr=4e-3")
ROWS = {
    "32 px, small network, batch 64": Row(
        32, 64, (*SMALL, "+backbone.kwargs.stem_stride=2", "data.num_workers=0")
    ),
    "32 px, ResNet-18, batch 512": Row(
        32, 512, ("data=photos", "~backbone.kwargs", "data.num_workers=0")
    ),
    "224 px, ResNet-18, batch 64, JPEG files": Row(
        224,
        64,
        (
            *("data=custom", "data.val_path=null", "~backbone.kwargs", "data.num_workers=2"),
            "augmentations=symmetric",
        ),
    ),
}


class Pairs(Callback):
    """Runs bare passes after each round, and takes the time of both."""

    def __init__(
        self, module: Any, cfg: Any, row: Row, noise: bool, clocks: Clocks, rounds: int
    ) -> None:
        super().__init__()
        self._module, self._cfg, self._row, self._noise = module, cfg, row, noise
        self._clocks, self._rounds = clocks, rounds
        self.whole: list[tuple[float, float]] = []
        self.bare: list[tuple[float, float]] = []
        self.parts: list[tuple[float, dict[str, float]]] = []
        """Of the rounds with clocks: seconds in all, and those of each part."""
        self._steps = 0

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Put the copy where the module is."""
        self._module = self._module.to(pl_module.device)
        shape = (self._row.batch, 3, self._row.side, self._row.side)
        self._views = [
            torch.rand(shape, device=pl_module.device).contiguous(memory_format=torch.channels_last)
            for _ in range(2)
        ]
        self._optimizer = build_optimizer(self._module.parameters(), self._cfg)
        self._cast = trainer.precision_plugin.train_step_context
        self._begin()

    def on_train_batch_end(
        self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """End a round and run its bare passes."""
        self._steps += 1
        if self._steps % STEPS:
            return
        if self._clocks.off:
            self.whole.append(_since(self._started))
            self.bare.append(self._bare_round())
        else:
            self.parts.append((_since(self._started)[0], self._clocks.taken()))
        trainer.should_stop = len(self.parts) == self._rounds
        self._clocks.off = not self._clocks.off
        self._begin()

    def _begin(self) -> None:
        self._clocks.clear()
        self._started = _now()

    def _bare_round(self) -> tuple[float, float]:
        started = _now()
        for _ in range(STEPS):
            self._model_step()
        if self._noise:
            self._module.eval().requires_grad_(False)
            for _ in range(STEPS):
                self._noise_step()
            self._module.train().requires_grad_(True)
        return _since(started)

    def _loss(self, views: list[torch.Tensor]) -> torch.Tensor:
        with self._cast():
            (names,) = ENCODERS["simclr"]
            found = [through(self._module, names, view).float().square().mean() for view in views]
        return torch.stack(found).sum()

    def _model_step(self) -> None:
        self._optimizer.zero_grad()
        self._loss(self._views).backward()
        self._optimizer.step()

    def _noise_step(self) -> None:
        views = [view.detach().requires_grad_() for view in self._views]
        torch.autograd.grad(self._loss(views), views)


class Clocks:
    """Seconds spent in functions, by the name of what they do."""

    def __init__(self) -> None:
        self._seconds: dict[str, float] = {}
        self._running: str | None = None
        self.off = True
        """Whether no time is taken."""

    def around(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """Return a function that is timed, unless it runs inside one that is."""

        @functools.wraps(function)
        def timed(*args: Any, **named: Any) -> Any:
            if self.off or self._running is not None:
                return function(*args, **named)
            self._running, started = name, _now()[0]
            try:
                return function(*args, **named)
            finally:
                self._seconds[name] = self._seconds.get(name, 0) + _since((started, 0))[0]
                self._running = None

        return timed

    def taken(self) -> dict[str, float]:
        """Return the seconds since `clear`."""
        return dict(self._seconds)

    def clear(self) -> None:
        """Begin anew."""
        self._seconds.clear()


def measure(given: argparse.Namespace) -> dict[str, Any]:
    """Return the result: two entries a row, craft and victim."""
    found = []
    for name in given.rows:
        row = ROWS[name]
        with tempfile.TemporaryDirectory() as folder:
            if given.tiny:
                row = row._replace(side=min(row.side, 48), batch=8)
            for kind in ("craft", "victim"):
                cfg = _configuration(name, row, kind, Path(folder), given)
                entry = _entry(name, kind, row, cfg, given.pairs)
                found.append(entry)
                told = {key: entry[key] for key in ("times_bare", "times_bare_cpu")}
                print(name, kind, {key: round(value, 3) for key, value in told.items()}, flush=True)
    return {
        "provenance": provenance(["torch", "torchvision", "timm", "lightly", "lightning", "numba"]),
        "what": f"SimCLR, rounds of {STEPS} model steps (and as many noise steps, T 1)",
        "tiny": given.tiny,
        "rows": found,
    }


def _configuration(name: str, row: Row, kind: str, folder: Path, given: Any) -> Any:
    """Return what is run: a craft of as many rounds as there are pairs, or a victim."""
    overrides = [*row.overrides, f"precision={given.precision}"]
    if given.tiny:
        tiny = "{layers:[1,1,1,1],channels:[8,8,8,8],stem_type:deep,stem_width:4}"
        overrides = [one for one in overrides if "backbone.kwargs" not in one]
        overrides.append(f"backbone.kwargs={tiny}")
    if "data=custom" in overrides:
        files = _files(folder / "files", row.side, 16 if given.tiny else FILES)
        overrides.append(f"data.train_path={files}")
    if kind == "craft":
        overrides += ["+poison=cp", f"poison.rounds={2 * given.pairs + 2}", "poison.pgd_steps=1"]
        overrides += [f"poison.model_steps={STEPS}", f"poison.noise_steps={STEPS}"]
    else:
        overrides.append("+poison=none")
    cfg = compose("simclr", [*overrides, f"optimizer.batch_size={row.batch}"])
    cfg.checkpoint.dir, cfg.seed, cfg.max_epochs = str(folder / kind), 0, 10_000
    for augmentation in cfg.augmentations:
        augmentation.crop_size = row.side
    return cfg


def _entry(name: str, kind: str, row: Row, cfg: Any, pairs: int) -> dict[str, Any]:
    """Run a craft or a victim, and return what it took."""
    clocks, made = Clocks(), []
    before = engine._callbacks

    def callbacks(selection: Any, settings: Any, run: Path, parts: Any) -> list[Any]:
        pairing = Pairs(
            *(copy.deepcopy(parts.module), settings, row, kind == "craft", clocks, pairs + 1)
        )
        made.append((pairing, parts))
        return [*before(selection, settings, run, parts), pairing]

    started = time.perf_counter()
    with ExitStack() as patched:
        for part, functions in CLOCKS.items():
            for owner, function in functions:
                timed = clocks.around(part, getattr(owner, function))
                patched.enter_context(mock.patch.object(owner, function, timed))
        timed = clocks.around("forward and loss", SimCLR.training_step)
        patched.enter_context(mock.patch.object(SimCLR, "training_step", timed))
        patched.enter_context(mock.patch.object(engine, "_callbacks", callbacks))
        result = engine.run(cfg)
    ((pairing, parts),) = made
    whole, bare = pairing.whole[1:], pairing.bare[1:]
    ratios = [one[0] / other[0] for one, other in zip(whole, bare, strict=True)]
    cpu = [one[1] / max(other[1], 1e-9) for one, other in zip(whole, bare, strict=True)]
    seconds = statistics.median(one[0] for one in whole)
    clocked = pairing.parts[1:]
    shares = {
        part: statistics.median(each.get(part, 0.0) for _, each in clocked)
        for part in [*CLOCKS, "forward and loss"]
    }
    other = statistics.median(each for each, _ in clocked) - sum(shares.values())
    return {
        "row": name,
        "kind": kind,
        "pairs": len(whole),
        "seconds": seconds,
        "bare_seconds": statistics.median(one[0] for one in bare),
        "times_bare": statistics.median(ratios),
        "times_bare_least": min(ratios),
        "times_bare_most": max(ratios),
        "times_bare_cpu": statistics.median(cpu),
        "seconds_of": {**shares, "other": max(0.0, other)},
        "steps": result["steps"],
        "precision": result["precision"],
        "seconds_in_all": time.perf_counter() - started,
        "loader_images_per_second": _loader_rate(parts, row.side, row.batch),
        "peak_memory_megabytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
    }


def _loader_rate(parts: Any, side: int, batch: int) -> float:
    """Return how many images a second the raw loader brings, an epoch after the first."""
    raw = RawDataset(parts.train, side)
    read_once(raw, "auto", parts.loader)
    loader = DataLoader(
        raw, batch, shuffle=True, drop_last=True, collate_fn=raw.collate,
        num_workers=parts.loader.num_workers,
    )  # fmt: skip
    started, images = time.perf_counter(), 0
    for found in loader:
        images += len(found.images)
    return images / (time.perf_counter() - started)


def _files(folder: Path, side: int, count: int) -> Path:
    """Write photographs as JPEG files, larger than the views that are made of them."""
    names = ("astronaut", "cat", "coffee", "rocket")
    for number in range(count):
        name = names[number % len(names)]
        (folder / name).mkdir(parents=True, exist_ok=True)
        left = number % 100
        crop = photograph(name).crop((left, 0, left + 290, 290))
        crop.resize((side, side), Image.Resampling.BICUBIC).save(
            folder / name / f"{number}.jpg", quality=90
        )
    return folder


def _now() -> tuple[float, float]:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter(), time.process_time()


def _since(started: tuple[float, float]) -> tuple[float, float]:
    clock, processor = _now()
    return clock - started[0], processor - started[1]


def main() -> None:
    """Measure and write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", nargs="+", choices=ROWS, default=list(ROWS))
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--precision", default="16-mixed")
    parser.add_argument("--tiny", action="store_true")
    given = parser.parse_args()
    print(write("whole", measure(given), "tiny" if given.tiny else given.precision))


if __name__ == "__main__":
    main()
