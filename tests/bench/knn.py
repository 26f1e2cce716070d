"""kNN: faiss against solo-learn's `WeightedKNNClassifier` and Lightly's `knn_predict`.

    python -m tests.bench.knn RUN IMAGES [--repeats N] [--bank N] [--queries N]

RUN is the folder of a run of the embedded engine, whose encoder makes the features; IMAGES holds
`train/` and `test/`, a folder a class. Every way normalises the same features and votes with the
same k and temperature; solo-learn (`$SOLO_LEARN_ROOT` or `~/solo-learn`) is left out where it is
not found.
"""

from __future__ import annotations

import argparse
import os
import resource
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from lightly.utils.benchmarking import knn_predict
from torch import Tensor
from torch.nn import functional

from cp_plugin.adapters.lightly import LightningHost
from cp_plugin.banks import Bank
from cp_plugin.checkpoints import load_run
from cp_plugin.data import load
from cp_plugin.engine import build_pipeline
from cp_plugin.evaluate import knn, vote
from cp_plugin.mirror import mirror
from cp_plugin.neighbours import QUERY_BATCH, search
from tests.bench.passport import interleaved, passport, write

K, TEMPERATURE = 200, 0.07
Sets = tuple[Tensor, Tensor, Tensor, Tensor]


def encoded(run: Path, images: Path, bank: int, queries: int) -> Sets:
    """Return features and labels of the bank and of the queries, images in a random order."""
    module, cfg = load_run(run)
    twin = mirror(build_pipeline(cfg))
    host = LightningHost(module, lambda sample, _: sample, ())
    found: list[Tensor] = []
    train, test = load("custom", images / "train", images / "test")
    for data, count in ((train, bank), (test, queries)):
        whole = Bank.clean(data, twin.crop_size)
        features = whole.features(host.encode, twin.normalize)
        order = torch.randperm(len(features), generator=torch.Generator().manual_seed(0))[:count]
        found += [features[order], whole.labels[order]]
    return found[0], found[1], found[2], found[3]


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

    def accuracy(sets: Sets) -> float:
        bank, labels, queries, truth = sets
        classifier = WeightedKNNClassifier(k=K, T=TEMPERATURE, distance_fx="cosine")
        classifier.update(bank, labels, queries, truth)
        return float(classifier.compute()[0])

    return accuracy


def measure(sets: Sets, repeats: int) -> dict[str, Any]:
    """Return the result: a row a way."""
    truth = sets[3]
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
                "milliseconds": times[name],
            }
        )
    checked = knn(sets[0], sets[1], sets[2], truth, K, TEMPERATURE).accuracy
    assert checked == 100 * float((exact == truth).double().mean())
    return {
        "passport": passport(["torch", "faiss-cpu", "lightly", "torchmetrics"]),
        "what": f"bank {tuple(sets[0].shape)}, queries {tuple(sets[2].shape)}, k {K}, "
        f"T {TEMPERATURE}, cosine",
        "peak_memory_megabytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
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
    result = measure(encoded(given.run, given.images, given.bank, given.queries), given.repeats)
    print(write("knn", result))
    for row in result["rows"]:
        print(f"{row['way']:12} {row['seconds']:7.2f} s  {row['accuracy']:.2f} %")


if __name__ == "__main__":
    main()
