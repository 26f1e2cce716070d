"""A few kills at random moments; `python -m tests.kills` makes many."""

import json
import subprocess
import sys

import pytest


@pytest.mark.slow
def test_killed_commands_go_on_to_the_same_result(tmp_path):
    # In a process of its own, which forks: this one may have threads.
    file = tmp_path / "kills.json"
    call = [sys.executable, "-m", "tests.kills", "--count", "4", "--json", str(file)]
    names = ("craft by image", "victim", "export", "protect")
    done = subprocess.run([*call, "--only", *names], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    assert [found["equal"] for found in json.loads(file.read_text())] == [True] * 4
