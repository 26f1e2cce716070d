"""SIGKILL in the middle of crafting: the same command goes on and ends with a poison."""

import json
import signal
import subprocess
import sys
import time
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


def start(folder: Path) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "cp_plugin.cli", "pretrain", *SETTINGS]
    return subprocess.Popen(command, cwd=folder, stderr=subprocess.PIPE, text=True)


@pytest.mark.slow
def test_a_killed_craft_goes_on_where_it_was(tmp_path):
    process = start(tmp_path)  # there is nothing to resume yet
    deadline = time.monotonic() + 120
    while not list(tmp_path.rglob("last.ckpt")) and time.monotonic() < deadline:
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.05)
    time.sleep(0.5)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert list(tmp_path.rglob("last.ckpt"))
    assert not list(tmp_path.rglob("poison.safetensors"))

    again = start(tmp_path)
    _, error = again.communicate(timeout=200)
    assert again.returncode == 0, error
    (poison,) = tmp_path.rglob("poison.safetensors")
    result = json.loads((poison.parent / "result.json").read_text())
    assert result["steps"] == result["surrogate_steps"] == 150
    assert result["resumed_from_step"] > 0

    finished = start(tmp_path)
    _, error = finished.communicate(timeout=200)
    assert finished.returncode == 0, error
    assert "is finished; nothing to do" in " ".join(error.split())
    assert len(list(tmp_path.rglob("poison.safetensors"))) == 1
