"""`+poison=…` and `+monitor=knn` on stable-pretraining's `spt run` and a configuration of it."""

from __future__ import annotations

import csv
import importlib
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from cp_plugin.attack.poison_file import Poison
from cp_plugin.data import Photos
from cp_plugin.util.patching import patches
from tests.support.applications import only, ran

spt = pytest.importorskip(
    "stable_pretraining", reason="stable-pretraining is not installed: pip install cp-plugin[spt]"
)
# Lightning, Hydra and stable-pretraining warn of their own uses of what is deprecated.
pytestmark = pytest.mark.filterwarnings("ignore")

EXAMPLES = Path(__file__).parents[1] / "examples"
METHODS = ("simclr", "byol", "dino")
CRAFT = ("+poison=cp", "poison.rounds=1", "poison.pgd_steps=1")


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A working folder with the configuration and small photographs in class folders."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("SPT_CACHE_DIR", str(tmp_path / "cache"))
    before = spt.get_config().cache_dir
    spt.set(cache_dir=str(tmp_path / "cache"))
    for method in METHODS:
        shutil.copy(EXAMPLES / f"spt_{method}.yaml", tmp_path / f"{method}.yaml")
    for split, train in (("train", True), ("validation", False)):
        photos = Photos(train=train, patches=2)
        for number, (pixels, label) in enumerate(zip(photos.data, photos.targets, strict=True)):
            place = tmp_path / "images" / split / f"class{label:02}"
            place.mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels).save(place / f"{number}.png")
    yield tmp_path
    spt.set(cache_dir=before)


def run(
    monkeypatch: Any, capsys: Any, folder: Path, *overrides: str, method: str = "simclr"
) -> Any:
    """Call what `spt run` starts, in this process."""
    main = importlib.import_module("stable_pretraining.run").main
    where = ["--config-path", str(folder), "--config-name", method]
    monkeypatch.setattr(sys, "argv", ["spt", *where, *overrides])
    return ran(main, capsys)


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
def test_craft_then_victim_then_knn(method, folder, monkeypatch, capsys):
    command = (sys.executable, "-m", "stable_pretraining.cli", "run", f"{method}.yaml", *CRAFT)
    made = subprocess.run(
        (*command, "trainer.max_epochs=1"),
        capture_output=True,
        text=True,
        cwd=folder,
        env=os.environ,
    )
    assert made.returncode == 0, made.stderr[-4000:]
    file = only(folder, "poison.safetensors")
    assert file.is_relative_to(folder / "outputs")
    poison = Poison.load(file)
    assert (poison.info["host"], poison.info["method"]) == ("stable-pretraining", method)
    branch = "none" if method == "simclr" else "backbone.teacher, projector.teacher"
    assert f"momentum branch of {method}: {branch}" in made.stdout + made.stderr
    assert len(poison.perturbation) == 24
    inject = ("+poison=inject", f"poison.path={file}", "+monitor=knn", "monitor.every_n_epochs=1")
    victim = run(monkeypatch, capsys, folder, *inject, method=method)
    assert victim.code == 0, victim.err[-4000:]
    with only(folder, "knn.csv").open() as written:
        found = list(csv.DictReader(written))
    assert [row["epoch"] for row in found] == ["0", "1"]
    assert all(0 <= float(row["knn_poisoned_bank"]) <= 100 for row in found)
    run_module = importlib.import_module("stable_pretraining.run")
    assert run_module.instantiate_from_config.__module__ == "stable_pretraining.config"
    assert not hasattr(run_module.instantiate_from_config, "__wrapped__")


@pytest.mark.parametrize(
    ("overrides", "says"),
    [
        (("+poison=inject", "poison.path=none"), "no poison file at none"),
        (("+poison=cp", "+poison.epsilon=1"), "did you mean poison.eps?"),
        (("+poison=error_min",), "is made on a supervised surrogate"),
        (("+poison=pil",), "is made on a supervised surrogate"),
    ],
)
def test_a_mistake_is_one_sentence(folder, overrides, says, monkeypatch, capsys):
    told = run(monkeypatch, capsys, folder, *overrides)
    sentences = [line for line in told.err.splitlines() if line.startswith("cp-plugin: ")]
    assert told.code == 2
    assert len(sentences) == 1
    assert says in sentences[0]
    assert not list(folder.rglob("*.ckpt"))


def test_the_patch_is_needed_and_taken_back():
    """Fails when upstream has healed: the patch can go then."""
    (patch,) = [patch for patch in patches() if patch.name == "resume_weights_only"]
    importlib.import_module("stable_pretraining.config")
    manager = importlib.import_module("stable_pretraining.manager").Manager
    own = manager.__init__
    assert patch.is_needed()
    undo = patch.apply()
    assert not patch.is_needed()
    undo()
    assert manager.__init__ is own
