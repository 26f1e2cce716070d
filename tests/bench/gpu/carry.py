"""What goes to a machine and comes back: `python -m tests.bench.gpu.carry unpack|keep|resume A B`.

unpack FOLDER OUT: CIFAR-10's JPEG files out of FOLDER/cifar10_jpeg_{train,test}.npz, one folder a
class. keep STUDY FILE: what a study has so far, as a small archive. resume FILE STUDY: the reverse;
cells whose own files were too large to be kept, and which an unfinished cell still needs, are run
again.
"""

from __future__ import annotations

import json
import sys
import tarfile
from pathlib import Path

import numpy as np

from cp_plugin.apps.study.state import FINISHED

LARGEST = 2 << 20
"""Bytes of a file that is kept: JSON, logs and class poisons, no checkpoints."""
NEEDED = {"craft": "poison.safetensors", "clean": "last.ckpt"}
"""What other cells need of one, by its kind."""


def unpack(folder: Path, out: Path) -> None:
    """Write the images of both splits as they are, as JPEG files."""
    for split in ("train", "test"):
        with np.load(folder / f"cifar10_jpeg_{split}.npz") as file:
            jpeg, offset, label, classes = (
                file[key] for key in ("jpeg", "offset", "label", "classes")
            )
        for name in classes:
            (out / split / str(name)).mkdir(parents=True, exist_ok=True)
        for number, kind in enumerate(label):
            path = out / split / str(classes[kind]) / f"{number:05}.jpg"
            path.write_bytes(jpeg[offset[number] : offset[number + 1]].tobytes())


def keep(study: Path, archive: Path) -> None:
    """Archive the small files of a study; the archive is whole at any time."""
    if not study.is_dir():
        return
    partial = archive.with_suffix(".partial")
    with tarfile.open(partial, "w:gz") as tar:
        for path in sorted(study.rglob("*")):
            if path.is_file() and path.stat().st_size <= LARGEST and path.suffix != ".lock":
                tar.add(path, path.relative_to(study))
    partial.replace(archive)


def resume(archive: Path, study: Path) -> list[str]:
    """Unpack an archive; return the names of finished cells that have to be run again."""
    study.mkdir(parents=True, exist_ok=True)
    with tarfile.open(archive) as tar:
        tar.extractall(study, filter="data")
    files = {path.stem: path for path in (study / "cells").glob("*.json")}
    cells = {name: json.loads(path.read_text()) for name, path in files.items()}
    planned = json.loads((study / "study.json").read_text())["cells"]
    wanted: set[str] = set()
    for cell in planned:
        if cells.get(cell["name"], {}).get("status") != FINISHED:
            wanted |= set(cell["needs"].values())
    again = [
        name
        for name, cell in cells.items()
        if name in wanted
        and cell.get("status") == FINISHED
        and not any((study / cell["folder"]).rglob(NEEDED.get(cell["kind"], "*")))
    ]
    for name in again:
        files[name].unlink()
    return again


def main() -> None:
    """Do what the first argument says."""
    action, source, target = sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3])
    done = {"unpack": unpack, "keep": keep, "resume": resume}[action](source, target)
    if done:
        print("run again:", ", ".join(done))


if __name__ == "__main__":
    main()
