"""kNN: faiss against solo-learn's `WeightedKNNClassifier` and Lightly's `knn_predict`.

    python -m tests.bench.knn RUN IMAGES [--repeats N] [--bank N] [--queries N]

RUN is the folder of a run of the embedded engine, whose encoder makes the features; IMAGES holds
`train/` and `test/`, a folder a class. Every way normalises the same features and votes with the
same k and temperature; solo-learn (`$SOLO_LEARN_ROOT` or `~/solo-learn`) is left out where it is
not found. Peak memory is what one more search holds above the memory in use before it (Linux).

What the monitor costs is told in parts of an epoch of the same run: an evaluation searches both
banks and makes the features of both and of the queries; an epoch is as many training steps, timed
on one batch, as the bank has batches.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from lightly.utils.benchmarking import knn_predict
from torch import Tensor
from torch.nn import functional
from torch.utils.data import Subset

from cp_plugin.apps.engine_runs import load_run
from cp_plugin.config.settings import MonitorConfig
from cp_plugin.data import load
from cp_plugin.engine.optimisation import build_optimizer
from cp_plugin.engine.pipeline import build_pipeline
from cp_plugin.evaluation.banks import Bank
from cp_plugin.evaluation.knn_search import QUERY_BATCH, search
from cp_plugin.evaluation.metrics import knn, vote
from cp_plugin.hosts.lightning import LightningHost
from cp_plugin.mirror import Mirror, mirror
from cp_plugin.util.patching import patches
from tests.bench.provenance import interleaved, provenance, write

K, TEMPERATURE = 200, 0.07
Sets = tuple[Tensor, Tensor, Tensor, Tensor]


@dataclass(frozen=True)
class Trained:
    """A run's encoder, and the data sets of the monitor."""

    module: Any
    twin: Mirror
    bank: Bank
    query: Bank

    @classmethod
    def of(cls, run: Path, images: Path, bank: int, queries: int) -> Trained:
        """Read a run, and as many images in a random order."""
        module, cfg = load_run(run)
        twin = mirror(build_pipeline(cfg))
        sets = []
        for data, count in zip(
            load("custom", images / "train", images / "test"), (bank, queries), strict=True
        ):
            order = torch.randperm(len(data), generator=torch.Generator().manual_seed(0))[:count]
            subset = Subset(data, order.tolist())
            sets.append(Bank.clean(subset, twin.crop_size))
        return cls(module, twin, *sets)

    def features(self, bank: Bank) -> Tensor:
        """Return the features of a bank's images."""
        host = LightningHost(self.module, lambda sample, _: sample, ())
        return bank.features(host.encode, self.twin.normalize)

    def epoch_seconds(self, steps: int = 5) -> float:
        """Return what an epoch on the bank takes, from the median of a few training steps."""
        size = self.module.cfg.optimizer.batch_size
        assert isinstance(self.bank.images, Tensor)
        images = self.bank.images[:size].float() / 255
        optimizer = build_optimizer(self.module.parameters(), self.module.cfg)
        generator = torch.Generator().manual_seed(0)

        def step() -> None:
            views = self.twin(images, generator=generator)
            optimizer.zero_grad()
            self.module.training_step((views, None), 0).backward()
            optimizer.step()

        self.module.train()
        taken = interleaved({"step": step}, steps)["step"]["median"] / 1e3
        return taken * (len(self.bank.labels) // size)


def ours(sets: Sets, index: str) -> Tensor:
    """Return the labels that win the votes."""
    bank, labels, queries, _ = sets
    classes = int(labels.max()) + 1
    return torch.cat(
        [
            vote(cosines, labels[rows], TEMPERATURE, classes)
            for cosines, rows in search(bank, queries, K, index)
        ]
    )


def lightlys(sets: Sets) -> Tensor:
    """Return the labels that Lightly's function ranks first."""
    bank, labels, queries, _ = sets
    columns = functional.normalize(bank).T.contiguous()
    ranked = [
        knn_predict(
            functional.normalize(part), columns, labels, int(labels.max()) + 1, K, TEMPERATURE
        )
        for part in queries.split(QUERY_BATCH)
    ]
    return torch.cat(ranked)[:, 0]


def solos() -> Callable[[Sets], float] | None:
    """Return solo-learn's classifier as a function to its accuracy, if it is here."""
    sys.path.insert(0, os.environ.get("SOLO_LEARN_ROOT", str(Path.home() / "solo-learn")))
    try:
        from solo.utils.knn import WeightedKNNClassifier
    except ImportError:
        return None
    for patch in patches():
        if patch.is_needed():
            patch.apply()

    def accuracy(sets: Sets) -> float:
        bank, labels, queries, truth = sets
        classifier = WeightedKNNClassifier(k=K, T=TEMPERATURE, distance_fx="cosine")
        classifier.update(bank, labels, queries, truth)
        return float(classifier.compute()[0])

    return accuracy


def peak_megabytes(run: Callable[[], Any]) -> float | None:
    """Return the most memory that was held while it ran, above what was held before."""
    told, status = Path("/proc/self/clear_refs"), Path("/proc/self/status")
    if not told.exists():
        return None

    def kilobytes(key: str) -> int:
        (line,) = (one for one in status.read_text().splitlines() if one.startswith(key))
        return int(line.split()[1])

    before = kilobytes("VmRSS")
    told.write_text("5")  # the peak starts anew
    run()
    return (kilobytes("VmHWM") - before) / 1024


def monitor(trained: Trained, times: dict[str, Any], features: float, every: int) -> dict[str, Any]:
    """Return what the monitor costs beside training, in percent of an epoch.

    Args:
        trained: the run.
        times: of the ways.
        features: seconds that making the features of bank and queries took.
        every: epochs between two evaluations.
    """
    images = len(trained.bank.labels) + len(trained.query.labels)
    whole = features * (images + len(trained.bank.labels)) / images  # the poisoned bank's too
    epoch = trained.epoch_seconds()
    found = 2 * times["faiss flat"]["median"] / 1e3
    return {
        "epoch_seconds": epoch,
        "search_seconds": found,
        "features_seconds": whole,
        "search_percent_of_an_epoch": 100 * found / epoch,
        "features_percent_of_an_epoch": 100 * whole / epoch,
        "every_n_epochs": every,
        "percent_of_training": 100 * (found + whole) / epoch / every,
    }


def measure(trained: Trained, repeats: int) -> dict[str, Any]:
    """Return the result: a row a way, and what the monitor costs."""
    start = time.perf_counter()
    bank, queries = (trained.features(one) for one in (trained.bank, trained.query))
    seconds = time.perf_counter() - start
    truth = trained.query.labels
    sets: Sets = (bank, trained.bank.labels, queries, truth)
    ways: dict[str, Callable[[], Any]] = {
        "faiss flat": lambda: ours(sets, "flat"),
        "faiss ivf": lambda: ours(sets, "ivf"),
        "Lightly": lambda: lightlys(sets),
    }
    solo = solos()
    if solo is not None:
        ways["solo-learn"] = lambda: solo(sets)
    accuracies = {name: way() for name, way in ways.items()}
    exact = accuracies["faiss flat"]
    times = interleaved(ways, repeats)
    rows = []
    for name, given in accuracies.items():
        votes = given if isinstance(given, Tensor) else None
        rows.append(
            {
                "way": name,
                "accuracy": given
                if votes is None
                else 100 * float((votes == truth).double().mean()),
                "votes_unlike_flat": None if votes is None else int((votes != exact).sum()),
                "seconds": times[name]["median"] / 1e3,
                **{
                    f"times_{other.lower().replace('-', '_')}": times[other]["median"]
                    / times[name]["median"]
                    for other in ("Lightly", "solo-learn")
                    if other in times
                },
                "peak_megabytes": peak_megabytes(ways[name]),
                "milliseconds": times[name],
            }
        )
    checked = knn(sets[0], sets[1], sets[2], truth, K, TEMPERATURE).accuracy
    assert checked == 100 * float((exact == truth).double().mean())
    return {
        "provenance": provenance(["torch", "faiss-cpu", "lightly", "torchmetrics"]),
        "what": f"bank {tuple(sets[0].shape)}, queries {tuple(sets[2].shape)}, k {K}, "
        f"T {TEMPERATURE}, cosine",
        "monitor": monitor(trained, times, seconds, MonitorConfig().every_n_epochs),
        "rows": rows,
    }


def main() -> None:
    """Measure, write the JSON, print a line a way."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run", type=Path)
    parser.add_argument("images", type=Path)
    parser.add_argument("--bank", type=int, default=50_000)
    parser.add_argument("--queries", type=int, default=10_000)
    parser.add_argument("--repeats", type=int, default=3)
    given = parser.parse_args()
    trained = Trained.of(given.run, given.images, given.bank, given.queries)
    result = measure(trained, given.repeats)
    print(write("knn", result))
    for row in result["rows"]:
        print(f"{row['way']:12} {row['seconds']:7.2f} s  {row['accuracy']:.2f} %")


if __name__ == "__main__":
    main()
