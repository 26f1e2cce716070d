"""What a figure needs to be believed: commit, versions, hardware, command, when; and its spread."""

from __future__ import annotations

import json
import os
import platform
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

RESULTS = Path(os.environ.get("CP_PLUGIN_RESULTS") or Path(__file__).parent / "results")


def provenance(packages: Sequence[str]) -> dict[str, Any]:
    """Return commit, versions, hardware, command and date."""
    return {
        "commit": _commit(),
        "date": time.strftime("%Y-%m-%d"),
        "python": platform.python_version(),
        "versions": {name: _version(name) for name in packages},
        "hardware": hardware(),
        "threads": torch.get_num_threads(),
        "load_before": os.getloadavg()[0],
        "command": portable(
            " ".join(["python -m", f"tests.bench.{Path(sys.argv[0]).stem}", *sys.argv[1:]])
        ),
    }


def portable(command: str) -> str:
    """Return a command with folders by their own names, wherever they lie on this machine."""
    return re.sub(r"(?<![^\s=])/\S*?([^/\s]+)/?(?=\s|$)", r"\1", command)


def hardware() -> str:
    """Name the GPU, or the processor and its cores."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    cpu = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.is_file():
        found = re.search(r"model name\s*:\s*(.+)", info.read_text())
        cpu = found.group(1).strip() if found else cpu
    # How fast bf16 is depends on them.
    instructions = torch.backends.cpu.get_cpu_capability()
    return f"{cpu}, {instructions}, {torch.get_num_threads()} threads"


def write(theme: str, result: dict[str, Any], variant: str = "") -> Path:
    """Write `results/<theme>_<hardware>[-<variant>]_<date>.json`."""
    told = f"{result['provenance']['hardware']} {variant}"
    name = re.sub(r"[^a-z0-9]+", "-", told.lower()).strip("-")
    path = RESULTS / f"{theme}_{name}_{result['provenance']['date']}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(result, indent=1) + "\n")
    return path


def source(result: dict[str, Any]) -> str:
    """Return command, commit, date, hardware and versions of a result, as the README tells them."""
    told = result["provenance"]
    versions = ", ".join(f"{name} {number}" for name, number in told["versions"].items())
    return (
        f"`{told['command']}` at {told['commit']}, {told['date']}, {told['hardware']}; {versions}."
    )


def interleaved(runs: dict[str, Callable[[], object]], repeats: int) -> dict[str, dict[str, float]]:
    """Time functions in turns, so that whatever else the machine does meets all of them.

    Returns:
        For each: `median`, `fastest`, `slowest` milliseconds, `cpu` (median milliseconds of
        processor time, all threads; on a busy machine the fairer one) and `n`.
    """
    taken: dict[str, list[float]] = {name: [] for name in runs}
    worked: dict[str, list[float]] = {name: [] for name in runs}
    for run in runs.values():
        run()
    for _ in range(repeats):
        for name, run in runs.items():
            _wait()
            start, work = time.perf_counter(), time.process_time()
            run()
            _wait()
            taken[name].append(1e3 * (time.perf_counter() - start))
            worked[name].append(1e3 * (time.process_time() - work))
    return {
        name: {
            "median": statistics.median(times),
            "fastest": min(times),
            "slowest": max(times),
            "cpu": statistics.median(worked[name]),
            "n": repeats,
        }
        for name, times in taken.items()
    }


def _wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def _commit() -> str:
    """Return the commit, with a word where the code that ran is not that of the commit."""
    commit = _git("rev-parse", "--short=12", "HEAD")
    changed = _git("status", "--porcelain", "--", "cp_plugin", "configs", "tests/bench/*.py")
    return (commit or "unknown") + (" with changes" if changed else "")


def _git(*arguments: str) -> str:
    done = subprocess.run(["git", *arguments], capture_output=True, text=True, check=False)
    return done.stdout.strip()


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "not installed"
