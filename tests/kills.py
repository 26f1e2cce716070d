"""Commands killed at random moments: `python -m tests.kills --count 50 [--seed 0] [--json FILE]`.

Craft, victim, export, protect and study are each run once without interruption, then killed by
SIGKILL again and again, started anew each time, and run to their end: what they leave must be the
same, bit for bit, and nothing half written. `integration/test_kills.py` takes a few kills.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import random
import re
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from PIL import Image
from safetensors.torch import load_file
from torchvision.transforms.functional import to_pil_image

from cp_plugin.data.photos import Photos

TINY = "backbone.kwargs={layers:[1,1,1,1],channels:[8,8,8,8],stem_type:deep,stem_width:4}"
RUN = (
    *("pretrain", "--config-name", "simclr", TINY, "optimizer.batch_size=16", "seed=0"),
    *("data=custom", "data.train_path=images", "data.val_path=null", "data.num_workers=0"),
    *("augmentations=crops", "checkpoint.frequency=1", "auto_resume.enabled=True"),
)
CRAFT = ("poison.rounds=6", "poison.model_steps=4", "poison.noise_steps=3", "max_epochs=1000")
STUDY = f"""
base: [data=photos, data.num_workers=0, augmentations=crops, optimizer.batch_size=256, "{TINY}"]
backbones: {{tiny: []}}
victim: [max_epochs=2]
poisons:
  cp_class:
    settings: [+poison=cp_class, poison.rounds=2, poison.model_steps=2, poison.noise_steps=2]
probe: none
grid:
  - {{poisons: [cp_class], victims: [simclr], surrogates: [simclr], seeds: [0]}}
"""
IGNORED = {"time", "call", "seconds", "seconds_in_all", "folder", "digest", "hardware", "versions",
           "command", "resumed_from_step"}  # fmt: skip
"""Keys of a study's cells that tell how it went, not what came of it."""
PICTURES = 66


class Scenario(NamedTuple):
    """A command, what it needs, and what it leaves."""

    arguments: tuple[str, ...]
    prepare: Callable[[Path, Path], None]
    """Fills a folder; the second is that of the finished craft."""
    result: Callable[[Path], dict[str, str]]
    """What is compared, by name."""


class Outcome(NamedTuple):
    """What became of a scenario."""

    name: str
    kills: int
    equal: bool
    told: str


def run(count: int, seed: int, names: Sequence[str] = ()) -> list[Outcome]:
    """Kill the commands so many times in all, and compare what they leave.

    Args:
        count: kills.
        seed: of their moments, as parts of the time that a command takes.
        names: of `SCENARIOS`; none: all.
    """
    chosen = {name: SCENARIOS[name] for name in names or SCENARIOS}
    draw, found = random.Random(seed), []
    with tempfile.TemporaryDirectory() as folder:
        whole = Path(folder) / "whole"
        made: dict[str, tuple[float, dict[str, str]]] = {}
        for name in dict.fromkeys(["craft", *chosen]):  # others take its poison
            made[name] = _uninterrupted(SCENARIOS[name], whole / name, whole / "craft")
        for number, (name, scenario) in enumerate(chosen.items()):
            kills = count // len(chosen) + (number < count % len(chosen))
            place = Path(folder) / f"killed-{name}"
            found.append(_killed(name, scenario, place, whole / "craft", made[name], kills, draw))
            print(*found[-1], flush=True)
    return found


def _uninterrupted(scenario: Scenario, place: Path, craft: Path) -> tuple[float, dict[str, str]]:
    place.mkdir(parents=True)
    scenario.prepare(place, craft)
    started = time.monotonic()
    code = os.waitstatus_to_exitcode(os.waitpid(_start(scenario, place), 0)[1])
    assert code == 0, (place / "log").read_text()[-3000:]
    return time.monotonic() - started, scenario.result(place)


def _killed(
    name: str,
    scenario: Scenario,
    place: Path,
    craft: Path,
    whole: tuple[float, dict[str, str]],
    kills: int,
    draw: random.Random,
) -> Outcome:
    """Kill a command so many times, at each end of it from the beginning again."""
    seconds, wanted = whole
    done, turn = 0, 0
    while done < kills:
        folder = place / str(turn)
        folder.mkdir(parents=True)
        scenario.prepare(folder, craft)
        finished = False
        while not finished:
            process = _start(scenario, folder)
            # What is left gets shorter each time, and so do the moments.
            until = time.monotonic() + draw.uniform(0.1, 1.0) * seconds / (1 + done % 3)
            while not (finished := _ended(process)) and (done == kills or time.monotonic() < until):
                time.sleep(0.01)
            if not finished:
                os.killpg(process, signal.SIGKILL)
                os.waitpid(process, 0)
                done += 1
        left = scenario.result(folder)
        # A command that was killed when all was done may refuse to do it over again.
        if _codes.pop(process) != 0 and left != wanted:
            return Outcome(name, done, False, (folder / "log").read_text()[-2000:])
        if left != wanted:
            differing = sorted(key for key in {*left, *wanted} if left.get(key) != wanted.get(key))
            return Outcome(name, done, False, f"differs: {', '.join(differing[:10])}")
        turn += 1
    return Outcome(name, done, True, f"{turn} times to its end")


_codes: dict[int, int] = {}


def _ended(process: int) -> bool:
    found, status = os.waitpid(process, os.WNOHANG)
    if found:
        _codes[process] = os.waitstatus_to_exitcode(status)
    return bool(found)


def _start(scenario: Scenario, folder: Path) -> int:
    """Start the command in a process of its own, which has all libraries loaded already."""
    process = os.fork()
    if process:
        return process
    code = 1
    try:
        os.setpgid(0, 0)
        os.chdir(folder)
        log = os.open("log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(log, 1)
        os.dup2(log, 2)
        from cp_plugin.apps.cli import main

        sys.argv = ["cp-plugin", *scenario.arguments]
        main()
        code = 0
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        import traceback

        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _images(folder: Path, _: Path) -> None:
    """Write pictures of several sizes in two classes."""
    photos = Photos(train=True, patches=PICTURES // 12 + 1)
    for number in range(PICTURES):
        image = photos[number * len(photos) // PICTURES][0]
        picture = image if isinstance(image, Image.Image) else to_pil_image(image)
        path = folder / "images" / "ab"[number % 2] / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        picture.save(path)


def _with_poison(folder: Path, craft: Path) -> None:
    _images(folder, craft)
    (file,) = craft.rglob("poison.safetensors")
    (folder / "poison.safetensors").write_bytes(file.read_bytes())


def _study(folder: Path, _: Path) -> None:
    (folder / "study.yaml").write_text(STUDY)


def _tensors(folder: Path) -> dict[str, str]:
    """Return digests of all poisons and of the weights of the last checkpoints."""
    found = {}
    for file in sorted(folder.rglob("poison.safetensors")):
        for name, tensor in load_file(file).items():
            found[f"{_run(file, folder)}/{name}"] = _digest(tensor)
    for file in sorted(folder.rglob("last.ckpt")):
        weights = torch.load(file, map_location="cpu", weights_only=True)["state_dict"]
        for name, tensor in weights.items():
            found[f"{_run(file, folder)}/{name}"] = _digest(tensor)
    found |= {str(path): "half written" for path in folder.rglob(".*") if path.suffix}
    return found


def _run(file: Path, folder: Path) -> str:
    """Name a run's folder; the tag of its settings tells where its poison lies, too."""
    return re.sub("-[0-9a-f]{8}$", "", str(file.relative_to(folder).parent))


def _files(folder: Path) -> dict[str, str]:
    """Return digests of the pictures in `out`, and of the poison beside it."""
    files = [path for path in sorted((folder / "out").rglob("*")) if path.is_file()]
    found = {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in files
    }
    return found | (_tensors(folder / "out-poison") if (folder / "out-poison").is_dir() else {})


def _cells(folder: Path) -> dict[str, str]:
    """Return what came of the cells of a study."""
    cells = sorted((folder / "out" / "cells").glob("*.json"))
    return _tensors(folder) | {
        path.stem: json.dumps(_plain(json.loads(path.read_text())), sort_keys=True)
        for path in cells
    }


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(one) for key, one in value.items() if key not in IGNORED}
    return [_plain(one) for one in value] if isinstance(value, list) else value


def _digest(tensor: torch.Tensor) -> str:
    return hashlib.sha256(tensor.contiguous().numpy().tobytes()).hexdigest()


SCENARIOS = {
    "craft": Scenario((*RUN, "+poison=cp_class", *CRAFT), _images, _tensors),
    "craft by image": Scenario(
        (*RUN, "+poison=cp", "poison.pgd_steps=2", *CRAFT), _images, _tensors
    ),
    "victim": Scenario(
        (*RUN, "+poison=inject", "poison.path=poison.safetensors", "max_epochs=8"),
        _with_poison,
        _tensors,
    ),
    "export": Scenario(
        ("export", "poison.safetensors", "out", "--data", "images"), _with_poison, _files
    ),
    "protect": Scenario(
        ("protect", "images", "out", "--rounds", "3", "--size", "32"), _images, _files
    ),
    "study": Scenario(("study", "study.yaml", "--out", "out"), _study, _cells),
}


def main() -> None:
    """Run it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", nargs="*", default=[], choices=SCENARIOS)
    parser.add_argument("--json", type=Path, default=None)
    given = parser.parse_args()
    torch.set_num_threads(1)
    import cp_plugin.apps.evaluate_run
    import cp_plugin.apps.protect.craft  # noqa: F401

    found = run(given.count, given.seed, given.only)
    if given.json is not None:
        given.json.write_text(json.dumps([one._asdict() for one in found], indent=1) + "\n")
    sys.exit(not all(one.equal for one in found))


if __name__ == "__main__":
    main()
