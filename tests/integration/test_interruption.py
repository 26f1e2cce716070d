"""SIGKILL in the middle of crafting: the same command goes on and ends with a poison."""

import json
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

SETTINGS = [
    "--config-name",
    "simclr",
    "+poison=cp_class",
    "poison.rounds=30",
    "poison.model_steps=5",
    "poison.noise_steps=1",
    "max_epochs=1000",
    "optimizer.batch_size=256",
    "backbone.kwargs.channels=[8,8,8,8]",
    "+backbone.kwargs.stem_stride=2",
    "data.num_workers=0",
    "checkpoint.frequency=1",
    "auto_resume.enabled=True",
]


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[[], subprocess.Popen[str]]]:
    """Starts the command; whatever still runs after the test is killed."""
    started: list[subprocess.Popen[str]] = []

    def run() -> subprocess.Popen[str]:
        command = [sys.executable, "-m", "cp_plugin.apps.cli", "pretrain", *SETTINGS]
        started.append(subprocess.Popen(command, cwd=tmp_path, stderr=subprocess.PIPE, text=True))
        return started[-1]

    yield run
    for process in started:
        process.kill()
        if process.stderr is not None and not process.stderr.closed:
            process.communicate()


@pytest.mark.slow
def test_a_killed_craft_goes_on_where_it_was(start, tmp_path):
    process = start()  # there is nothing to resume yet
    deadline = time.monotonic() + 120
    while not list(tmp_path.rglob("last.ckpt")) and time.monotonic() < deadline:
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.05)
    time.sleep(0.5)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert list(tmp_path.rglob("last.ckpt"))
    assert not list(tmp_path.rglob("poison.safetensors"))

    again = start()
    _, error = again.communicate(timeout=200)
    assert again.returncode == 0, error
    (poison,) = tmp_path.rglob("poison.safetensors")
    result = json.loads((poison.parent / "result.json").read_text())
    assert result["steps"] == result["surrogate_steps"] == 150
    assert result["resumed_from_step"] > 0

    finished = start()
    _, error = finished.communicate(timeout=200)
    assert finished.returncode == 0, error
    assert "is finished; nothing to do" in " ".join(error.split())
    assert len(list(tmp_path.rglob("poison.safetensors"))) == 1
