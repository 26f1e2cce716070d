"""What a killed process had begun to write does not stay."""

import os
import subprocess
import sys

from cp_plugin.util.whole_files import HERE, clear_partial, written_whole

KILLED = """
import os, signal, sys
from pathlib import Path
from cp_plugin.util.whole_files import written_whole
with written_whole(Path(sys.argv[1])) as partial:
    partial.write_bytes(b"half")
    os.kill(os.getpid(), signal.SIGKILL)
"""


def test_half_a_file_of_a_killed_process_is_removed(tmp_path):
    inner = tmp_path / "tree"
    for name in ("picture.png", ".mark"):
        subprocess.run([sys.executable, "-c", KILLED, str(inner / name)], check=False)
    assert len(list(inner.iterdir())) == 2
    (inner / f".other.elsewhere-{os.getpid()}.png").write_bytes(b"another machine's")
    (inner / f".notes.{HERE}.png").write_bytes(b"somebody's own")
    with written_whole(inner / "mine.png") as partial:
        partial.write_bytes(b"whole")
        clear_partial(tmp_path)
        assert partial.exists()
    left = sorted(path.name for path in inner.iterdir())
    assert left == [f".notes.{HERE}.png", f".other.elsewhere-{os.getpid()}.png", "mine.png"]
