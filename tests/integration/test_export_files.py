"""Every file of a folder is exported as it is shown, or named as left out."""

from __future__ import annotations

import logging
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf
from PIL import Image, ImageCms, ImageOps

from cp_plugin import Poison
from cp_plugin.apps import export as module
from cp_plugin.apps.export import UNFINISHED, export
from cp_plugin.attack.perturbation import Perturbation
from cp_plugin.config.settings import UserError
from cp_plugin.data import FlatFolder, Photos, RawDataset, load
from cp_plugin.util.whole_files import sha256

LEVELS = 8


@pytest.fixture
def pixels(photos: Photos) -> list[np.ndarray]:
    return list(photos.data[:12])


def poison_for(folder: Path, path: Path, size: int = 32) -> Path:
    """Write a poison with a row for every image that a folder has now."""
    raw = RawDataset(FlatFolder(folder), size)
    keys = torch.unique(torch.tensor([raw[row].key for row in range(len(raw))]))
    draw = torch.Generator().manual_seed(0)
    rows = Perturbation.uniform(len(keys), (3, size, size), LEVELS / 255, generator=draw)
    return Poison(rows, "sample", keys).save(path)


def shown(path: Path) -> Image.Image:
    with Image.open(path) as picture:
        return ImageOps.exif_transpose(picture)


def off(written: Path, expected: np.ndarray) -> int:
    with Image.open(written) as picture:
        found = np.asarray(picture.convert("RGB")).astype(int)
    return int(np.abs(found - expected.astype(int)).max())


def test_pictures_are_written_as_they_are_shown(
    pixels: list[np.ndarray], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder, out = tmp_path / "in", tmp_path / "out"
    folder.mkdir()
    turned = Image.Exif()
    turned[0x0112] = 6
    Image.fromarray(pixels[0]).save(folder / "phone.jpg", exif=turned, quality=95)
    ramp = np.linspace(0, 65535, 1024).reshape(32, 32).astype(np.uint16)
    Image.fromarray(ramp).save(folder / "grey16.png")
    alpha = np.where(np.arange(32) < 16, 255, 40)[None].repeat(32, 0).astype(np.uint8)
    Image.fromarray(np.dstack([pixels[1], alpha])).save(folder / "alpha.png")
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    Image.fromarray(pixels[2]).save(folder / "icc.png", icc_profile=profile)
    Image.fromarray(pixels[3]).save(folder / "web.gif")
    for name, number in (("browser.jfif", 4), ("iphone.HEIC", 5), ("scan.avif", 6)):
        Image.fromarray(pixels[number]).save(tmp_path / "x.jpg", quality=95)
        shutil.copy(tmp_path / "x.jpg", folder / name)
    Image.fromarray(pixels[7]).resize((96, 32)).save(folder / "wide.png")
    frames = [Image.fromarray(each) for each in pixels[8:11]]
    frames[0].save(folder / "moving.webp", save_all=True, append_images=frames[1:])
    (folder / "notes.txt").write_text("x")
    (folder / "real.heic").write_bytes(b"no picture")
    poison = poison_for(folder, tmp_path / "poison.safetensors")
    with caplog.at_level(logging.INFO, "cp_plugin"):
        caplog.clear()
        count = export(poison, out, folder)
    said = "\n".join(caplog.messages)

    written = {path.name for path in out.iterdir()}
    assert count == len(written) == 9
    assert written == {
        *("phone.png", "grey16.png", "alpha.png", "icc.png", "web.png", "browser.png"),
        *("iphone.png", "scan.png", "wide.png"),
    }
    assert off(out / "phone.png", np.asarray(shown(folder / "phone.jpg"))) <= LEVELS
    grey = (ramp / 257).round()[..., None].repeat(3, 2)
    assert off(out / "grey16.png", grey) <= LEVELS
    with Image.open(out / "alpha.png") as picture:
        assert picture.mode == "RGBA"
        assert np.array_equal(np.asarray(picture.getchannel("A")), alpha)
    assert off(out / "alpha.png", pixels[1]) <= LEVELS
    with Image.open(out / "icc.png") as picture:
        assert picture.info["icc_profile"] == profile
    with Image.open(folder / "web.gif") as picture:
        assert off(out / "web.png", np.asarray(picture.convert("RGB"))) <= LEVELS
    for text in ("notes.txt (no picture)", "real.heic (Pillow cannot read it: pip install"):
        assert text in said
    assert "1 files of" in said
    assert "moving.webp (animated)" in said
    assert "resized and cropped to 32 x 32: wide.png (32 x 96)" in said


@pytest.mark.parametrize("labelled", [True, False])
def test_a_folder_is_given_relative_to_the_working_directory(
    pixels: list[np.ndarray], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, labelled: bool
) -> None:
    monkeypatch.chdir(tmp_path)
    for number, name in enumerate(("a", "b")):
        (Path("in") / name).mkdir(parents=True)
        Image.fromarray(pixels[number]).save(Path("in") / name / "x.png")
    poison = poison_for(Path("in"), tmp_path / "poison.safetensors")
    if labelled:  # as `cp-plugin export POISON OUT` finds them, beside a run's configuration
        cfg = {"dataset": "custom", "train_path": "in", "no_labels": False}
        OmegaConf.save({"data": cfg}, tmp_path / "config.yaml")
    assert export(poison, Path("out"), None if labelled else Path("in")) == 2
    for number, name in enumerate(("a", "b")):
        assert 0 < off(Path("out") / name / "x.png", pixels[number]) <= LEVELS


def test_linked_folders_and_loose_files(
    pixels: list[np.ndarray], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Links are followed with and without labels, once; loose files are named."""
    folder, elsewhere = tmp_path / "in", tmp_path / "elsewhere"
    for number, place in enumerate((folder / "a", elsewhere, folder)):
        place.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels[number]).save(place / f"{number}.png")
    (folder / "b").symlink_to(elsewhere)
    (folder / "a" / "again").symlink_to(folder)
    (folder / ".hidden").mkdir()
    flat = [Path(path).relative_to(folder) for path, _ in FlatFolder(folder).samples]
    assert sorted(map(str, flat)) == ["2.png", "a/0.png", "b/1.png"]
    with caplog.at_level(logging.INFO, "cp_plugin"):
        caplog.clear()
        labelled = load("custom", folder)[0]
    assert labelled.classes == ["a", "b"]
    assert [(Path(path).name, label) for path, label in labelled.samples] == [
        ("0.png", 0),
        ("1.png", 1),
    ]
    assert any("2.png (beside the class folders)" in text for text in caplog.messages)


def test_names_that_differ_by_their_ending_do_not_collide(
    pixels: list[np.ndarray], tmp_path: Path
) -> None:
    folder = tmp_path / "in"
    folder.mkdir()
    for number, name in enumerate(("a.jpg", "a.png", "a.bmp", "a.bmp.png", "b.JPG")):
        Image.fromarray(pixels[number]).save(folder / name)
    poison = poison_for(folder, tmp_path / "poison.safetensors")
    assert export(poison, tmp_path / "out", folder) == 5
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        *("a.png", "a.jpg.png", "a.bmp.png", "a.bmp.png.png", "b.png")
    }
    assert off(tmp_path / "out" / "a.png", pixels[1]) <= LEVELS


def test_an_interrupted_export_goes_on(
    pixels: list[np.ndarray], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, out = tmp_path / "in", tmp_path / "out"
    folder.mkdir()
    for number in range(6):
        Image.fromarray(pixels[number]).save(folder / f"{number}.png")
    poison = poison_for(folder, tmp_path / "poison.safetensors")
    write, calls = module._write, []

    def dying(*arguments: object) -> None:
        calls.append(arguments)
        if len(calls) == 4:
            raise KeyboardInterrupt
        write(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(module, "_write", dying)
    with pytest.raises(KeyboardInterrupt):
        export(poison, out, folder)
    monkeypatch.undo()
    assert len(list(out.glob("*.png"))) == 3
    Image.fromarray(pixels[7]).save(folder / "7.png")
    other = poison_for(folder, tmp_path / "other.safetensors")
    with pytest.raises(UserError, match="unfinished export of another poison"):
        export(other, out, folder)
    (folder / "7.png").unlink()
    assert export(poison, out, folder) == 6
    assert {path.name for path in out.iterdir()} == {f"{number}.png" for number in range(6)}
    with pytest.raises(UserError, match="not empty"):
        export(poison, out, folder)


def test_new_images_are_named_and_other_images_refused(
    pixels: list[np.ndarray], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder, out = tmp_path / "in", tmp_path / "out"
    folder.mkdir()
    for number in range(4):
        Image.fromarray(pixels[number]).save(folder / f"{number}.png")
    poison = poison_for(folder, tmp_path / "poison.safetensors")
    Image.fromarray(pixels[8]).save(folder / "new.png")
    for name in ("0.bmp", "broken.png"):  # the first and a later one
        (folder / name).write_bytes(b"no picture")
    with caplog.at_level(logging.INFO, "cp_plugin"):
        assert export(poison, out, folder) == 4
    said = "\n".join(caplog.messages)
    assert "new.png (the poison has no row for it)" in said
    assert "0.bmp (unreadable), broken.png (unreadable)" in said
    others = tmp_path / "others"
    others.mkdir()
    Image.fromarray(pixels[9]).save(others / "9.png")
    with pytest.raises(UserError, match="no row for any of the 1 images"):
        export(poison, tmp_path / "none", others)
    assert not (tmp_path / "none").exists()


def test_images_that_carry_no_perturbation_are_named(
    pixels: list[np.ndarray], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder, out = tmp_path / "in", tmp_path / "out"
    folder.mkdir()
    for number in range(4):
        Image.fromarray(pixels[number]).save(folder / f"{number}.png")
    whole = Poison.load(poison_for(folder, tmp_path / "whole.safetensors"))
    assert whole.keys is not None
    whole.part(0.5, whole.keys, None).save(tmp_path / "half.safetensors")
    for _ in range(2):  # a second time, as after an interruption
        caplog.clear()
        with caplog.at_level(logging.INFO, "cp_plugin"):
            assert export(tmp_path / "half.safetensors", out, folder) == 4
        (out / UNFINISHED).write_text(sha256(tmp_path / "half.safetensors"))
        clean = [n for n in range(4) if not off(out / f"{n}.png", pixels[n])]
        assert len(clean) == 2
        named = ", ".join(f"{number}.png (outside the poison)" for number in clean)
        assert f"2 files of {out} are as they were, without a perturbation: {named}" in caplog.text
