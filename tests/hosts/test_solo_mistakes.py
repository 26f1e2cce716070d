"""Bad input to stock solo-learn: one sentence, an exit code, and nothing written anywhere."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest

from tests.support.applications import CPU, CRAFT, SMALL, Stock, custom, only

# Stock solo-learn, timm and Lightning warn of their own uses of what is deprecated.
pytestmark = [pytest.mark.filterwarnings("ignore")]


class Made(NamedTuple):
    """Poisons that a user has at hand, and the overrides of the data set they belong to."""

    data: tuple[str, ...]
    sample: Path
    of_classes: Path
    of_half: Path


MISTAKES: dict[str, tuple[Callable[[Made], tuple[str, ...]], str]] = {
    "a method that compares labels": (
        lambda made: ("+poison=cp", "method=supcon"),
        "no poison can be crafted with method=supcon: its loss compares labels",
    ),
    "class poison without labels": (
        lambda made: ("+poison=cp_class", "+data.no_labels=True"),
        "data.no_labels=True leaves no labels",
    ),
    "class noise without labels": (
        lambda made: ("+poison=random", "poison.granularity=class", "+data.no_labels=True"),
        "data.no_labels=True leaves no labels",
    ),
    "class poison into unlabelled images": (
        lambda made: (*inject(made.of_classes), "+data.no_labels=True", "data.train_path=flat"),
        "needs labelled images",
    ),
    "too few images for a batch": (
        lambda made: (*inject(made.sample), "optimizer.batch_size=32"),
        "24 images make no batch of 32",
    ),
    "no image of a batch to craft with": (
        lambda made: ("+poison=cp", "optimizer.batch_size=32"),
        "24 images make no batch of 32",
    ),
    "sample poison of other images": (
        lambda made: (*inject(made.sample), "data.train_path=other"),
        "the poison has no row for",
    ),
    "class poison of other classes": (
        lambda made: (*inject(made.of_classes), "data.train_path=renamed"),
        "the poison was made for",
    ),
    "a larger data.fraction than crafted with": (
        lambda made: (*inject(made.of_half), "+data.fraction=0.7"),
        "the poison has no row for",
    ),
    "an unknown key of the craft": (
        lambda made: ("+poison=cp", "+poison.epsilon=1"),
        "did you mean poison.eps?",
    ),
    "an unknown key of the injection": (
        lambda made: (*inject(made.sample), "+poison.frction=0.5"),
        "did you mean poison.fraction?",
    ),
    "an unknown key of the monitor": (
        lambda made: ("+monitor=knn", "+monitor.neighbours=3"),
        "monitor.neighbours",
    ),
}


def inject(file: Path) -> tuple[str, ...]:
    return "+poison=inject", f"poison.path={file}"


def everything(folder: Path) -> dict[Path, float]:
    return {path: path.stat().st_mtime_ns for path in folder.rglob("*")}


@pytest.fixture
def made(
    stock: Stock,
    image_folder: Callable[..., Path],
    tmp_path: Path,
) -> Made:
    data = custom(image_folder("train", 3, 8), image_folder("val", 3, 4))
    image_folder("other", 3, 8, 40)
    for folder in sorted(image_folder("renamed", 3, 8).iterdir()):
        folder.rename(folder.with_name(f"other_{folder.name}"))
    image_folder("flat", 3, 8, flat=True)
    runs = {
        "sample": ("+poison=random",),
        "of_classes": ("+poison=cp_class", *CRAFT),
        "of_half": ("+poison=random", "+data.fraction=0.5"),
    }
    files = []
    for name, overrides in runs.items():
        ran = stock.pretrain("cifar/simclr", *data, *overrides, f"checkpoint.dir=made/{name}")
        assert ran.code == 0, ran.err
        files.append(only(tmp_path / "made" / name, "poison.safetensors"))
    return Made(data, *files)


def test_a_mistake_is_one_sentence_and_writes_nothing(
    stock: Stock,
    made: Made,
    tmp_path: Path,
) -> None:
    before = everything(tmp_path)
    for name, (overrides, text) in MISTAKES.items():
        ran = stock.pretrain("cifar/simclr", *made.data, *overrides(made))
        sentences = [line for line in ran.err.splitlines() if line.startswith("cp-plugin: ")]
        told = [line for line in sentences if "momentum branch" not in line]
        assert told, (name, ran)
        assert text in told[-1], name
        assert len(told) == 1, (name, told)
        assert "Traceback" not in ran.out + ran.err, name
        assert ran.code == 2, name
        assert everything(tmp_path) == before, name


def test_the_exit_code_is_that_of_the_process(
    solo_learn: Path, image_folder: Callable[..., Path], tmp_path: Path
) -> None:
    data = custom(image_folder("train", 2, 4))
    before = everything(tmp_path)
    command = [
        *(sys.executable, str(solo_learn / "main_pretrain.py")),
        *("--config-path", f"{solo_learn}/scripts/pretrain/cifar", "--config-name", "simclr"),
        *(*CPU, *SMALL, *data, "+poison=cp_class", "+data.no_labels=True"),
    ]
    environment = {**os.environ, "PYTHONPATH": str(solo_learn), "WANDB_MODE": "disabled"}
    ran = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert ran.returncode == 2
    (sentence,) = [line for line in ran.stderr.splitlines() if line.startswith("cp-plugin: ")]
    assert "leaves no labels" in sentence
    assert "Traceback" not in ran.stderr
    assert everything(tmp_path) == before
