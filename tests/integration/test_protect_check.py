"""`cp-plugin protect --check`: two real small networks, told apart by held-out pictures."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from cp_plugin import Poison
from cp_plugin.apps.cli import app
from cp_plugin.apps.protect import protect
from cp_plugin.apps.protect.check import check, sentence
from cp_plugin.apps.protect.plan import Settings
from cp_plugin.apps.protect.sources import sources_of
from cp_plugin.apps.protect.split import Pair, Split, check_enough
from cp_plugin.config.settings import UserError
from tests.support.mixed_pictures import write_mixed

pytestmark = [pytest.mark.filterwarnings("ignore")]

SMALL = (
    "augmentations.0.crop_size=32",
    "backbone.kwargs.channels=[8,8,8,8]",
    "method_kwargs.proj_hidden_dim=16",
)
SETTINGS = Settings(size=64, rounds=2, clusters=3, overrides=SMALL)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Ninety-six files in one folder, so that folders name no classes."""
    root = tmp_path_factory.mktemp("pictures")
    for file in write_mixed(root / "tree", 96, side=60):
        (root / "in").mkdir(exist_ok=True)
        file.rename(root / "in" / file.name)
    return root / "in"


@pytest.fixture(scope="module")
def out(folder: Path) -> Path:
    """The pictures protected by the poison of a short craft."""
    out = folder.with_name("out")
    protect([folder], out, SETTINGS)
    return out


@pytest.fixture(scope="module")
def poison(out: Path) -> Path:
    return out.with_name("out-poison") / "poison.safetensors"


def test_the_command_says_what_it_found(folder: Path, out: Path, poison: Path) -> None:
    call = ["protect", str(folder), str(out), "--with", str(poison), "--check"]
    call += ["--check-minutes", "0.3", *(word for one in SMALL for word in ("--set", one))]
    before = sorted(out.rglob("*"))
    ran = CliRunner().invoke(app, call)
    assert ran.exit_code == 0, ran.output
    assert sorted(out.rglob("*")) == before
    found = json.loads((out.with_name("out-poison") / "check.json").read_text())
    assert (found["labels"], found["training"], found["held_out"]) == ("cluster", 72, 24)
    pairs = [(row["trained_on"], row["bank"]) for row in found["rows"]]
    assert pairs == [(a, b) for a in ("originals", "protected") for b in ("originals", "protected")]
    assert all(0 <= row[way] <= 100 for row in found["rows"] for way in ("knn", "linear"))
    assert found["steps"][0] == found["steps"][1] > 0
    assert found["minutes"] < 2 * 0.3
    assert not (out.with_name("out-poison") / "check").exists()
    assert "kNN names the cluster of held-out originals in" in ran.output.replace("\n", " ")


def test_pictures_without_a_change_show_no_difference(
    folder: Path, poison: Path, tmp_path: Path
) -> None:
    """Weights, batches and steps are the same, so that pictures alone make the difference."""
    pairs = [Pair(source.name, source.file, source.file) for source in sources_of([folder], poison)]
    split = Split(pairs[:70], pairs[70:])
    tmp_path.joinpath("work").mkdir()
    found = check(split, tmp_path / "work", SETTINGS, Poison.load(poison), 0.3)
    measured = [(row["knn"], row["linear"]) for row in found["rows"]]
    assert len(set(measured)) == 1
    assert found["difference"] == 0
    assert not found["stands_out"]
    assert "No effect stands out" in sentence(found)


def test_too_few_minutes(folder: Path, poison: Path, tmp_path: Path) -> None:
    pairs = [Pair(source.name, source.file, source.file) for source in sources_of([folder], poison)]
    tmp_path.joinpath("work").mkdir()
    with pytest.raises(UserError, match=r"minutes are too few to check 96 pictures"):
        check(Split(pairs[:70], pairs[70:]), tmp_path / "work", SETTINGS, Poison.load(poison), 1e-3)


def test_too_few_pictures_are_told_before_anything_is_done() -> None:
    check_enough(86)
    with pytest.raises(UserError, match=r"needs at least 86 pictures.* there are 85"):
        check_enough(85)


@pytest.mark.parametrize(
    ("clean", "protected", "words"),
    [
        (80.0, 40.0, "stands out. It is that of one pair of small networks"),
        (80.0, 78.0, "No effect stands out"),
        (26.0, 25.0, "has learnt too little for a loss to show"),
    ],
)
def test_words(clean: float, protected: float, words: str) -> None:
    from cp_plugin.apps.protect.check import judged

    rows: list[dict[str, Any]] = [{"knn": clean}, {}, {"knn": protected}, {}]
    facts = {"labels": "folder", "held_out": 100, "largest_group": 25.0}
    assert words in sentence({**facts, "rows": rows, **judged(rows, 100)})
