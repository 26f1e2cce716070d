"""A disk that is really full, a small tmpfs: one sentence, and the last state is intact."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from cp_plugin.apps.export import export
from cp_plugin.attack import perturbation, snapshot
from cp_plugin.attack.perturbation import Perturbation
from cp_plugin.attack.poison_file import Poison
from cp_plugin.attack.row_file import RowFile
from cp_plugin.data import image_key
from cp_plugin.util.whole_files import NoRoom
from tests.kills import SCENARIOS
from tests.support.applications import Ran

EPS, SIDE, COUNT = 8 / 255, 64, 12
ROW = 3 * SIDE * SIDE


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Callable[[int], Path]]:
    """A disk of so many bytes; called again, the same one with another size."""
    folder, mounted = tmp_path / "disk", []

    def sized(size: int) -> Path:
        folder.mkdir(exist_ok=True)
        how = f"{'remount,' if mounted else ''}size={size}"
        command = ["mount", "-t", "tmpfs", "-o", how, "tmpfs", str(folder)]
        try:
            done = subprocess.run(command, capture_output=True, text=True)
        except OSError as error:
            pytest.skip(f"nothing can be mounted here: {error}")
        assert not (mounted and done.returncode), done.stderr
        if done.returncode:
            pytest.skip(f"nothing can be mounted here: {done.stderr.strip()}")
        mounted.append(folder)
        return folder

    yield sized
    if mounted:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


def drawn(seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (torch.rand(COUNT, 3, SIDE, SIDE, generator=generator) * 2 - 1) * EPS


def written(folder: Path) -> list[str]:
    return sorted(str(file.relative_to(folder)) for file in folder.rglob("*") if file.is_file())


@pytest.mark.parametrize("in_file", [True, False])
def test_rows_that_find_no_room_leave_the_last_snapshot(
    disk: Callable[[int], Path], monkeypatch: pytest.MonkeyPatch, in_file: bool
) -> None:
    monkeypatch.setattr(perturbation, "LEAST_SAVED_BY_ROWS", 0)
    folder = disk(int(1.7 * COUNT * ROW))
    file = folder / "delta-01234567.rows" if in_file else None
    rows = Perturbation.zeros(COUNT, (3, SIDE, SIDE), EPS, "int8", file)
    every = torch.arange(COUNT)
    rows.write(every, drawn(0))
    state, saved = rows.stored.clone(), snapshot.save(folder, 1, rows, {})
    rows.write(every[:2], drawn(1)[:2])  # what changed still has room, all has not
    snapshot.save(folder, 2, rows, {})

    def save() -> None:
        rows.write(every, drawn(2))
        snapshot.save(folder, 3, rows, {})

    with pytest.raises(NoRoom, match="no room left on the disk"):
        save()
    delta = snapshot.load([folder], saved)["delta"]
    assert isinstance(delta, RowFile)
    assert torch.equal(delta[:], state)
    assert [name for name in written(folder) if "step" in name] == [
        f"delta-step={step:08d}.safetensors" for step in (1, 2)
    ]


@pytest.mark.parametrize("in_file", [True, False])
def test_a_poison_that_finds_no_room_is_not_there(
    disk: Callable[[int], Path], tmp_path: Path, in_file: bool
) -> None:
    file = tmp_path / "some.rows" if in_file else None
    rows = Perturbation.zeros(COUNT, (3, SIDE, SIDE), EPS, "int8", file)
    rows.write(torch.arange(COUNT), drawn(0))
    poison = Poison(rows, "sample", torch.arange(COUNT))
    folder = disk(COUNT * ROW // 2)
    with pytest.raises(NoRoom, match=r"poison\.safetensors cannot be written"):
        poison.save(folder / "poison.safetensors")
    assert written(folder) == []
    poison.save(disk(2 * COUNT * ROW) / "poison.safetensors")
    found = Poison.load(folder / "poison.safetensors").perturbation.stored
    assert torch.equal(found, rows.stored)


def test_an_export_goes_on_when_there_is_room(disk: Callable[[int], Path], tmp_path: Path) -> None:
    draw, keys = np.random.default_rng(0), []
    (tmp_path / "clean").mkdir()
    for number in range(COUNT):
        pixels = draw.integers(0, 256, (SIDE, SIDE, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / "clean" / f"{number:02d}.png")
        keys.append(image_key(torch.from_numpy(pixels).permute(2, 0, 1)))
    rows = Perturbation.zeros(COUNT, (3, SIDE, SIDE), EPS)
    rows.write(torch.arange(COUNT), drawn(0))
    file = Poison(rows, "sample", torch.tensor(keys)).save(tmp_path / "poison.safetensors")
    folder = disk(5 * (ROW + 8192))
    with pytest.raises(NoRoom, match="no room left on the disk"):
        export(file, folder / "out", tmp_path / "clean")
    some = [name for name in written(folder) if name.endswith(".png")]
    assert 0 < len(some) < COUNT
    disk(4 * COUNT * ROW)
    export(file, folder / "out", tmp_path / "clean")
    export(file, tmp_path / "whole", tmp_path / "clean")
    whole = {one.name: one.read_bytes() for one in (tmp_path / "whole").rglob("*.png")}
    assert len(whole) == COUNT
    assert {one.name: one.read_bytes() for one in (folder / "out").rglob("*.png")} == whole


def room(folder: Path) -> int:
    """Bytes that a folder takes on a disk of pages."""
    pages = sum(-(-path.stat().st_size // 4096) for path in folder.rglob("*") if path.is_file())
    return 4096 * (pages + sum(path.is_dir() for path in folder.rglob("*")))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "part", "code"), [("craft", 0.5, 2), ("protect", 0.6, 2), ("study", 0.5, 1)]
)
def test_a_command_that_finds_no_room_goes_on_to_what_it_would_have_left(
    disk: Callable[[int], Path],
    call: Callable[..., Ran],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    name: str,
    part: float,
    code: int,
) -> None:
    scenario, whole, folder = SCENARIOS[name], tmp_path / "whole", disk(1 << 28)
    for place in (whole, folder):
        place.mkdir(exist_ok=True)
        scenario.prepare(place, place)
    before = room(folder)
    monkeypatch.chdir(whole)
    assert call(*scenario.arguments).code == 0
    monkeypatch.chdir(folder)
    disk(before + int(part * (room(whole) - before)))
    found = call(*scenario.arguments)
    told = found.out + found.err
    assert found.code == code, told  # a study with cells that failed is not mistaken
    assert "Traceback" not in told
    assert "NoRoom" not in told
    assert re.search(r"\S+ cannot be written, since there is no room left on the disk", told)
    assert "make room and run the same command again" in told
    scenario.result(folder)  # what is there can be read
    disk(1 << 28)
    assert call(*scenario.arguments).code == 0
    assert scenario.result(folder) == scenario.result(whole)
