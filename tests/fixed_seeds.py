"""Digests of crafts and victims with fixed seeds, which a change of structure must not change.

`python -m tests.fixed_seeds FILE` records the digests of the code at hand for this processor and
these versions; `test_fixed_seeds.py` compares them where both are the same.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import platform
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

RECORDED = Path(__file__).parent / "fixtures" / "fixed_seeds.json"
SMALL = (
    *("optimizer.batch_size=128", "backbone.kwargs.channels=[8,8,8,8]", "seed=3"),
    *("+backbone.kwargs.stem_stride=2", "data.num_workers=0", "precision=32", "max_epochs=2"),
)
CRAFT = ("poison.rounds=2", "poison.model_steps=3", "poison.noise_steps=2", "poison.pgd_steps=2")
CRAFTS = {
    "simclr_class": ("simclr", "cp_class", CRAFT),
    "simclr_sample": ("simclr", "cp", CRAFT),
    "simclr_joint": (
        *("simclr", "cp_class"),
        ("poison.schedule=joint", "poison.rounds=1", "poison.model_steps=8"),
    ),
    "mocov2plus_class": ("mocov2plus", "cp_class", CRAFT),
    "byol_sample": ("byol", "cp", CRAFT),
}
VICTIMS = ("simclr_class", "byol_sample")


def environment() -> dict[str, str]:
    """Return what digests depend on besides the code: the processor and the versions."""
    info = Path("/proc/cpuinfo")
    flags = info.read_text(encoding="utf8") if info.exists() else ""
    widest = next((name for name in ("avx512f", "avx2") if name in flags), "other")
    return {
        "processor": f"{platform.machine()} {widest}",
        "torch": torch.__version__,
        "torchvision": _version("torchvision"),
        "timm": _version("timm"),
        "lightly": _version("lightly"),
    }


def measure(folder: Path) -> dict[str, str]:
    """Craft each of `CRAFTS`, train each of `VICTIMS`; return a digest a poison and a victim."""
    found = {}
    for name, (method, poison, settings) in CRAFTS.items():
        run = folder / name
        _pretrain(run, method, f"+poison={poison}", *settings)
        (file,) = run.rglob("poison.safetensors")
        found[name] = _digest(load_file(file)["delta"])
        if name in VICTIMS:
            victim = folder / f"{name}_victim"
            _pretrain(
                *(victim, "simclr", "+poison=inject", f"poison.path={file}", "+monitor=knn"),
                *("monitor.every_n_epochs=1",),
            )
            (file,) = victim.rglob("result.json")
            rows = json.loads(file.read_text(encoding="utf8"))["knn"]
            curve = [(row["step"], row["knn_clean_bank"], row["knn_poisoned_bank"]) for row in rows]
            found[f"{name}_victim"] = json.dumps(curve)
    return found


def _pretrain(folder: Path, method: str, *settings: str) -> None:
    folder.mkdir(parents=True)
    command = ["-c", "import sys; from importlib.metadata import entry_points as e; "]
    command[1] += "(m,) = e(group='console_scripts', name='cp-plugin'); sys.exit(m.load()())"
    arguments = ["pretrain", "--config-name", method, *SMALL, *settings]
    subprocess.run(
        [sys.executable, *command, *arguments],
        cwd=folder,
        check=True,
        capture_output=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )


def _digest(tensor: torch.Tensor) -> str:
    return hashlib.sha256(tensor.contiguous().view(torch.uint8).numpy().tobytes()).hexdigest()


def _version(package: str) -> str:
    from importlib.metadata import version

    return version(package)


def main() -> None:
    """Record digests."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("file", type=Path, nargs="?", default=RECORDED)
    file = parser.parse_args().file
    with tempfile.TemporaryDirectory() as folder:
        recorded: dict[str, Any] = {"environment": environment(), "digests": measure(Path(folder))}
    file.write_text(json.dumps(recorded, indent=2) + "\n", encoding="utf8")


if __name__ == "__main__":
    main()
