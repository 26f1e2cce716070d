"""A full disk is answered in one sentence; what was finished is intact, and the command goes on."""

from __future__ import annotations

import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from cp_plugin.apps.export import export
from cp_plugin.attack.perturbation import Perturbation
from cp_plugin.attack.poison_file import Poison
from cp_plugin.data import Canonical, image_key

SIDE = 64
LIMIT = 10_000
"""Bytes that a file may have: less than a picture of noise, more than one of a colour."""
CRAFT = [
    *("pretrain", "--config-name", "simclr", "+poison=cp", "poison.rounds=4"),
    *("poison.model_steps=5", "poison.noise_steps=3", "poison.pgd_steps=1", "max_epochs=1000"),
    *("optimizer.batch_size=256", "backbone.kwargs.channels=[8,8,8,8]", "checkpoint.frequency=1"),
    *("+backbone.kwargs.stem_stride=2", "data.num_workers=0", "auto_resume.enabled=True"),
]


def started(folder: Path, *arguments: str, limit: int | None = None) -> subprocess.Popen[str]:
    """Starts the command, in which no file may grow beyond a limit."""

    def limited() -> None:
        if limit is not None:
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))

    return subprocess.Popen(
        [sys.executable, "-m", "cp_plugin.apps.cli", *arguments],
        cwd=folder,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=limited,
    )


def refusal(process: subprocess.Popen[str]) -> str:
    _, error = process.communicate(timeout=300)
    assert process.returncode == 2, error
    assert "Traceback" not in error
    assert "no room left on the disk" in error
    return error


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    """Pictures of one colour, and after them some of noise, which need more room."""
    folder = tmp_path / "clean"
    folder.mkdir()
    draw = np.random.default_rng(0)
    for number in range(6):
        pixels = np.full((SIDE, SIDE, 3), 20 * number, np.uint8)
        if number >= 3:
            pixels = draw.integers(0, 256, pixels.shape, dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{number}.png")
    return folder


def poison_for(pictures: Path, fit: str) -> Poison:
    """A poison that is the same in all pixels, so that a picture of one colour stays one."""
    canonical, keys = Canonical(SIDE, fit), []
    for file in sorted(pictures.iterdir()):
        with Image.open(file) as picture:
            keys.append(image_key(canonical(picture.convert("RGB"))))
    rows = Perturbation(torch.full((len(keys), 3, SIDE, SIDE), 4 / 255), 8 / 255)
    return Poison(rows, "sample", torch.tensor(keys), info={"fit": fit})


def content(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*.png")}


def test_an_export_goes_on_when_there_is_room(pictures: Path, tmp_path: Path) -> None:
    file = poison_for(pictures, "crop").save(tmp_path / "poison.safetensors")
    arguments = ("export", str(file), "out", "--data", str(pictures))
    refusal(started(tmp_path, *arguments, limit=LIMIT))
    assert sorted(content(tmp_path / "out")) == ["0.png", "1.png", "2.png"]
    process = started(tmp_path, *arguments)
    _, error = process.communicate(timeout=300)
    assert process.returncode == 0, error
    export(file, tmp_path / "whole", pictures)
    assert content(tmp_path / "out") == content(tmp_path / "whole")


def test_protect_goes_on_when_there_is_room(pictures: Path, tmp_path: Path) -> None:
    file = poison_for(pictures, "cover").save(tmp_path / "poison.safetensors")
    arguments = ("protect", str(pictures), "out", "--with", str(file))
    refusal(started(tmp_path, *arguments, limit=LIMIT))
    before = content(tmp_path / "out")
    assert sorted(before) == ["0.png", "1.png", "2.png"]
    process = started(tmp_path, *arguments)
    _, error = process.communicate(timeout=300)
    assert process.returncode == 0, error
    after = content(tmp_path / "out")
    assert len(after) == 6
    assert before.items() <= after.items()


@pytest.mark.slow
def test_a_craft_that_is_killed_and_then_finds_no_room_ends_as_the_one_never_stopped(
    tmp_path: Path,
) -> None:
    for name in ("whole", "killed"):
        (tmp_path / name).mkdir()
    process = started(tmp_path / "whole", *CRAFT)
    _, error = process.communicate(timeout=300)
    assert process.returncode == 0, error

    folder = tmp_path / "killed"
    process = started(folder, *CRAFT)
    wait_for(lambda: bool(list(folder.rglob("last.ckpt"))), process)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    state = {file: file.read_bytes() for file in folder.rglob("*") if file.suffix == ".ckpt"}
    (snapshot, *_) = sorted(folder.rglob("delta-step=*"))
    refusal(started(folder, *CRAFT, limit=20_000))
    for file, before in state.items():
        assert file.read_bytes() == before
    assert snapshot.exists()
    assert not list(folder.rglob("*.safetensors.*")) + list(folder.rglob("poison.safetensors"))

    process = started(folder, *CRAFT)
    _, error = process.communicate(timeout=300)
    assert process.returncode == 0, error
    poisons = [only(tmp_path / name, "poison.safetensors") for name in ("whole", "killed")]
    whole, resumed = (Poison.load(file) for file in poisons)
    assert whole.keys.tolist() == resumed.keys.tolist()
    assert torch.equal(whole.perturbation.stored, resumed.perturbation.stored)


def wait_for(there: Callable[[], bool], process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + 300
    while not there() and time.monotonic() < deadline:
        assert process.poll() is None, process.communicate()[1]
        time.sleep(0.02)


def only(folder: Path, name: str) -> Path:
    (file,) = folder.rglob(name)
    return file
