"""Cells of a study at once in a few processes: the same figures, and a process killed is named."""

from __future__ import annotations

import json
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from cp_plugin.apps.study import run_side_by_side
from cp_plugin.apps.study.settings import StudySettings, read
from tests.support.applications import custom

SMALL = ["optimizer.batch_size=8", "data.num_workers=0", "augmentations=crops"]


@pytest.fixture
def settings(image_folder: Callable[..., Path], tmp_path: Path) -> StudySettings:
    """A clean run, a craft beside it, and the craft's victim."""
    images = custom(image_folder("train", 2, 8), image_folder("val", 2, 4))
    network = "backbone.kwargs={layers:[1,1,1,1],channels:[8,8,8,8],stem_type:deep,stem_width:4}"
    craft = ["+poison=cp_class", "poison.schedule=joint", "poison.rounds=2", "poison.model_steps=2"]
    node = {
        "base": [*images, *SMALL],
        "victim": ["max_epochs=2"],
        "probe": "none",
        "backbones": {"tiny": [network]},
        "poisons": {"cp_class": {"settings": craft}},
        "grid": [
            {"poisons": ["cp_class"], "victims": ["simclr"], "surrogates": ["simclr"], "seeds": [0]}
        ],
    }
    (tmp_path / "study.yaml").write_text(json.dumps(node), encoding="utf8")
    return read(str(tmp_path / "study.yaml"))


@pytest.fixture
def threads() -> Iterator[Callable[[int], None]]:
    """Sets how many threads torch takes."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def _figures(result: dict[str, Any]) -> dict[str, Any]:
    return {
        cell["name"]: (cell["result"]["train_loss"], cell.get("banks"), cell.get("control"))
        for cell in result["cells"]
    }


@pytest.mark.slow
def test_two_at_once_give_what_one_after_the_other_gives(
    settings: StudySettings, tmp_path: Path, threads: Callable[[int], None]
) -> None:
    threads(1)
    one = run_side_by_side(settings, tmp_path / "one")
    threads(2)
    two = run_side_by_side(settings, tmp_path / "two")
    assert one["unfinished"] == two["unfinished"] == {}
    assert _figures(one) == _figures(two)
    ran = {
        cell["name"]: (cell["time"] - cell["seconds_in_all"], cell["time"]) for cell in two["cells"]
    }
    craft, clean = ran["craft-cp_class-simclr-tiny-0"], ran["clean-simclr-tiny-0"]
    assert max(craft[0], clean[0]) < min(craft[1], clean[1]), "they ran at once"


@pytest.mark.slow
def test_a_process_that_is_killed_is_named_and_the_same_call_goes_on(
    settings: StudySettings, tmp_path: Path, threads: Callable[[int], None]
) -> None:
    threads(1)
    out = tmp_path / "out"
    watch = threading.Thread(target=_kill_the_first_cell, args=(out,))
    watch.start()
    result = run_side_by_side(settings, out)
    watch.join()
    (first,) = [name for name, reason in result["unfinished"].items() if "outside" in reason]
    assert f"jobs/{first}.log" in result["unfinished"][first]
    assert run_side_by_side(settings, out)["unfinished"] == {}


def _kill_the_first_cell(out: Path) -> None:
    own = str(os.getpid())
    while not any((out / "cells").glob("*.json")):
        time.sleep(0.05)
    for process in Path("/proc").iterdir():
        if not process.name.isdigit():
            continue
        try:
            stat = (process / "stat").read_text().rpartition(")")[2].split()
            line = (process / "cmdline").read_text()
        except OSError:
            continue
        if stat[1] == own and "spawn_main" in line:
            os.kill(int(process.name), signal.SIGKILL)
