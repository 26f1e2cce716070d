"""Picture files of all kinds: read, changed and written with what they have beside pixels."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import tifffile
import torch
from PIL import Image
from torchvision.io import ImageReadMode, decode_png, read_file

from cp_plugin.data import Canonical
from cp_plugin.data.picture_pixels import CannotProtect, add, ending, read, write
from cp_plugin.data.png16 import read_png, write_png
from tests.support.mixed_pictures import BROKEN, KINDS, write_broken, write_mixed

EPS = 8 / 255
GRID = Canonical(24, "cover")


@pytest.fixture(scope="module")
def mixed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    files = write_mixed(tmp_path_factory.mktemp("mixed"), len(KINDS))
    return dict(zip(KINDS, files, strict=True))


def delta() -> torch.Tensor:
    return (torch.rand(3, 24, 24, generator=torch.Generator().manual_seed(0)) * 2 - 1) * EPS


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("file_format", ["png", "same"])
def test_what_is_written_is_what_was_meant(
    mixed: dict[str, Path], tmp_path: Path, kind: str, file_format: str
) -> None:
    source = mixed[kind]
    picture, canonical = read(source, GRID)
    before = picture.colours.copy()
    assert canonical.shape == (3, 24, 24)
    add(picture, delta(), EPS)
    out = tmp_path / f"out{ending(source, file_format)}"  # type: ignore[arg-type]
    write(picture, out)
    again, _ = read(out, GRID)
    full = 65535 if picture.deep else 255
    off = np.abs(before.astype(int) - picture.colours)
    assert 0 < off.max() <= full * EPS + 1e-6
    if out.suffix != ".jpg":
        assert np.array_equal(again.colours, picture.colours)
        assert again.colours.dtype == picture.colours.dtype
    if picture.alpha is not None:
        assert again.alpha is not None
        assert np.array_equal(again.alpha, picture.alpha)
    with Image.open(source) as one, Image.open(out) as other:
        assert one.size == other.size
        assert one.getexif().get(0x0112, 1) == other.getexif().get(0x0112, 1)
        assert one.info.get("icc_profile") == other.info.get("icc_profile")
        assert (picture.changed_mode is None) == (one.mode not in ("P", "1"))
        if picture.changed_mode is None:
            assert one.mode == other.mode


@pytest.mark.filterwarnings("ignore:The image decoding")  # torchvision's, of itself
def test_sixteen_bit_is_read_by_other_decoders(mixed: dict[str, Path], tmp_path: Path) -> None:
    picture, _ = read(mixed["colour16.tif"], GRID)
    assert np.array_equal(picture.colours, tifffile.imread(mixed["colour16.tif"]))
    picture.alpha = picture.colours[:, :, 0].copy()
    write(picture, tmp_path / "deep.png")
    decoded = decode_png(read_file(str(tmp_path / "deep.png")), ImageReadMode.UNCHANGED)
    planes = decoded.permute(1, 2, 0).numpy()
    assert np.array_equal(planes[:, :, :3], picture.colours)
    assert np.array_equal(read_png(tmp_path / "deep.png"), planes)
    assert np.array_equal(planes[:, :, 3], picture.alpha)
    with Image.open(tmp_path / "deep.png") as shown:
        shown.load()  # checks the sums of the chunks
        assert np.array_equal(np.asarray(shown)[:, :, :3], picture.colours >> 8)


@pytest.mark.parametrize("channels", [1, 2, 3, 4])
@pytest.mark.filterwarnings("ignore:The image decoding")
def test_sixteen_bit_png_files(tmp_path: Path, channels: int) -> None:
    draw = np.random.default_rng(channels)
    pixels = draw.integers(0, 65536, (150, 37, channels)).astype(np.uint16)
    write_png(tmp_path / "deep.png", pixels)
    decoded = decode_png(read_file(str(tmp_path / "deep.png")), ImageReadMode.UNCHANGED)
    assert np.array_equal(decoded.permute(1, 2, 0).numpy(), pixels)
    assert np.array_equal(read_png(tmp_path / "deep.png"), pixels)


def test_inks_keep_the_bound_in_rgb(mixed: dict[str, Path], tmp_path: Path) -> None:
    picture, _ = read(mixed["inks.jpg"], GRID)
    add(picture, delta(), EPS)
    write(picture, tmp_path / "inks.tif")
    with Image.open(mixed["inks.jpg"]) as one, Image.open(tmp_path / "inks.tif") as other:
        assert other.mode == "CMYK"
        before, after = (np.asarray(each.convert("RGB")).astype(int) for each in (one, other))
    assert 0 < np.abs(before - after).max() <= 8


@pytest.fixture(scope="module")
def broken(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("broken")
    write_broken(folder)
    return folder


@pytest.mark.parametrize("name", BROKEN)
def test_files_that_cannot_be_protected_say_why(broken: Path, name: str) -> None:
    reasons = {"giant.png": "too large", "moving.gif": "2 frames"}
    with pytest.raises(CannotProtect, match=reasons.get(name, "unreadable")):
        read(broken / name, GRID)
