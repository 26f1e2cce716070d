"""The job for a machine with a GPU, rehearsed without one: every line of it runs."""

import json
import os
import subprocess
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch

from cp_plugin.apps.study.settings import read
from tests.bench.gpu.carry import keep, resume, unpack

BENCH = Path(__file__).parents[1] / "bench"


@pytest.mark.slow
def test_the_job_runs_from_end_to_end_with_tiny_sizes(tmp_path):
    out = tmp_path / "out"
    done = subprocess.run(
        ["bash", str(BENCH / "gpu.sh"), str(out)],
        env={**os.environ, "TINY": "1", "PYTHON": sys.executable, "BUDGET": "1500",
             "TESTS_SECONDS": "300"},
        capture_output=True,
        text=True,
        check=False,
    )  # fmt: skip
    log = (out / "job.log").read_text()
    assert done.returncode == 0, log[-3000:]
    for stage in ("tests", "step", "mirror", "whole", "study"):
        assert f"== {stage}: exit 0" in log
    for theme in ("step", "mirror", "whole"):
        (file,) = out.glob(f"{theme}_*.json")
        assert json.loads(file.read_text())["provenance"]
    resume(out / "study.tar.gz", tmp_path / "later")
    cells = [json.loads(path.read_text()) for path in (tmp_path / "later" / "cells").iterdir()]
    assert {cell["status"] for cell in cells if "status" in cell} == {"finished"}
    assert len(cells) == 4


def test_an_earlier_study_goes_on_without_what_was_too_large_to_carry(tmp_path):
    study = tmp_path / "study"
    (study / "cells").mkdir(parents=True)
    cells = [
        {"name": "craft-a", "kind": "craft", "needs": {}, "folder": "runs/a"},
        {"name": "craft-b", "kind": "craft", "needs": {}, "folder": "runs/b"},
        {"name": "craft-c", "kind": "craft", "needs": {}, "folder": "runs/c"},
        {"name": "victim-a", "kind": "victim", "needs": {"poison": "craft-a"}},
        {"name": "victim-b", "kind": "victim", "needs": {"poison": "craft-b"}},
        {"name": "victim-c", "kind": "victim", "needs": {"poison": "craft-c"}},
    ]
    (study / "study.json").write_text(json.dumps({"cells": cells}))
    for cell in cells[:3]:
        state = {**cell, "status": "finished"}
        (study / "cells" / f"{cell['name']}.json").write_text(json.dumps(state))
    done = {**cells[5], "status": "finished", "folder": "runs/v"}
    (study / "cells" / "victim-c.json").write_text(json.dumps(done))
    for name, size in (("a", 10), ("b", 3 << 20), ("c", 3 << 20)):
        (study / "runs" / name).mkdir(parents=True)
        (study / "runs" / name / "poison.safetensors").write_bytes(bytes(size))
    keep(study, tmp_path / "study.tar.gz")
    with tarfile.open(tmp_path / "study.tar.gz") as tar:
        assert not any(member.size > 2 << 20 for member in tar.getmembers())
    # b's poison was too large and its victim is still to come; c's victim is finished.
    assert resume(tmp_path / "study.tar.gz", tmp_path / "later") == ["craft-b"]
    left = sorted(path.stem for path in (tmp_path / "later" / "cells").iterdir())
    assert left == ["craft-a", "craft-c", "victim-c"]


def test_carried_images_are_written_as_they_are(tmp_path):
    for split in ("train", "test"):
        np.savez(
            tmp_path / f"cifar10_jpeg_{split}.npz",
            jpeg=np.frombuffer(b"onetwo!", dtype=np.uint8),
            offset=np.array([0, 3, 7]),
            label=np.array([1, 0], dtype=np.uint8),
            classes=np.array(["cat", "dog"]),
        )
    unpack(tmp_path, tmp_path / "out")
    assert (tmp_path / "out" / "train" / "dog" / "00000.jpg").read_bytes() == b"one"
    assert (tmp_path / "out" / "test" / "cat" / "00001.jpg").read_bytes() == b"two!"


@pytest.mark.parametrize("name", ["cifar10", "tiny"])
def test_the_cells_of_the_job_are_a_study(name, tmp_path, monkeypatch):
    from cp_plugin.apps.study.plan import check, plan

    monkeypatch.setenv("CIFAR10", str(tmp_path))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    cells = plan(read(str(BENCH / "gpu" / f"{name}.yaml")))
    check(cells)
    assert next(iter(cells)).startswith(("craft-cp_class", "clean"))
