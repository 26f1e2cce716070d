"""What reads files from elsewhere, and intact files of each kind."""

from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from omegaconf import OmegaConf
from PIL import Image

from cp_plugin.apps.engine_runs import EngineRun, load_run
from cp_plugin.apps.export import _authors_delta
from cp_plugin.apps.hydra_app import compose
from cp_plugin.apps.pictures import picture_of_rows
from cp_plugin.apps.report.csv_file import as_csv
from cp_plugin.apps.report.leaderboard import leaderboard
from cp_plugin.apps.report.page import _how, _steps, _summary
from cp_plugin.apps.report.rows import find
from cp_plugin.apps.report.tables import tables
from cp_plugin.apps.study.plan import plan
from cp_plugin.apps.study.settings import read as read_study
from cp_plugin.attack.perturbation import Perturbation
from cp_plugin.attack.poison_file import Poison
from cp_plugin.data import Canonical, RawDataset, load
from cp_plugin.data.picture_pixels import add, ending, write
from cp_plugin.data.picture_pixels import read as read_picture
from cp_plugin.data.png16 import write_png
from cp_plugin.defences import Denoiser
from cp_plugin.engine.methods import build_method
from cp_plugin.engine.placement import CENTRES, SPEC, WEIGHTS, Placement
from cp_plugin.engine.run import check
from cp_plugin.engine.settings import complete, plain
from tests.fuzz.mutations import (
    HOSTILE,
    Mutation,
    bomb,
    in_header,
    in_json,
    in_lines,
    in_metadata,
)
from tests.support.hostile import WritesWhenUnpickled
from tests.support.results import bank

EPS, SIDE = 8 / 255, 16
SMALL = ["backbone.kwargs.channels=[8,8,8,8]", "data.num_workers=0"]


@dataclass(frozen=True)
class Case:
    """A kind of input."""

    seeds: Mapping[str, bytes]
    """Intact files by name."""
    mutations: tuple[Mutation, ...]
    """That know its format, beside those of any bytes."""
    read: Callable[[str, bytes, Path], None]
    """Reads a file of this name and content in a folder that it may fill; raises what it raises."""


def poisons(place: Path) -> Case:
    """Poison files of each granularity, type of row and fit."""
    info = {"schedule": json.dumps({"surrogate_steps_done": 3, "rows_not_moved": 0})}
    info |= {"parts": json.dumps([{"method": "simclr", "model_steps": 3, "noise_steps": 2}])}
    info |= {"versions": json.dumps({"torch": "2"}), "fraction": "1.0", "method": "simclr"}
    keys = torch.tensor([11, -22, 33, 44])
    names = ("cat", "dog", "ship", "<b>")
    made = {
        "sample": Poison(_rows("float16"), "sample", keys, None, info),
        "class": Poison(_rows("int8"), "class", None, names, info, keys[:2]),
        "cover": Poison(_rows("float32"), "sample", keys, None, {**info, "fit": "cover"}),
        "placed": _placed(info),
    }
    seeds = {}
    for name, poison in made.items():
        seeds[name] = poison.save(place / f"{name}.safetensors").read_bytes()
    return Case(seeds, (in_header, in_metadata, in_metadata), _read_poison)


def _rows(dtype: Any) -> Perturbation:
    draw = torch.Generator().manual_seed(0)
    return Perturbation.uniform(4, (3, SIDE, SIDE), EPS, dtype, draw)


def _placed(info: Mapping[str, str]) -> Poison:
    cfg = complete(compose("simclr", SMALL))
    encoder = build_method(cfg, 32).backbone.eval()
    arguments = {"whiten": cfg.backbone.get("whiten"), **plain(cfg.backbone.kwargs)}
    spec = {"name": cfg.backbone.name, "side": 32, "arguments": arguments}
    spec |= {"mean": [0.5] * 3, "std": [0.25] * 3}
    placement = Placement(encoder, torch.eye(4, 8), spec)
    assert set(placement.tensors()) > {CENTRES}
    assert all(name.startswith((CENTRES, WEIGHTS)) for name in placement.tensors())
    assert SPEC in placement.info()
    names = tuple(f"cluster {number}" for number in range(4))
    whole = {**info, **placement.info(), "fit": "cover"}
    return Poison(_rows("float16"), "class", None, names, whole, None, placement.tensors())


def _read_poison(name: str, content: bytes, place: Path) -> None:
    file = place / "poison.safetensors"
    file.write_bytes(content)
    poison = Poison.load(file)
    placement = Placement.of(poison)
    height, width = poison.size
    if height * width > 1 << 16:
        return
    clean = torch.randint(0, 256, (2, 3, height, width), dtype=torch.uint8)
    poisoned = poison.apply(clean, torch.tensor([0, -1]))
    off = (poisoned.short() - clean.short()).abs().amax((1, 2, 3)).tolist()
    assert off[0] <= math.floor(255 * poison.eps + 1e-6)
    assert off[1] == 0
    poison.rows(keys=[11], classes=["cat"])
    assert poison.fraction > 0
    assert poison.images is None or poison.images > 0
    picture_of_rows(poison, place / "rows.png")
    if placement is not None:
        assert int(placement.clusters(clean[:, :, :32, :32])[0]) < len(placement.centres)
    again = Poison.load(poison.save(place / "again.safetensors"))
    assert torch.equal(again.perturbation.stored, poison.perturbation.stored)


def denoisers(place: Path) -> Case:
    """A denoiser that purifies images."""
    whole = Denoiser(3, 16).save(place / "denoiser.safetensors").read_bytes()
    return Case({"denoiser": whole}, (in_header, in_metadata), _read_denoiser)


def _read_denoiser(name: str, content: bytes, place: Path) -> None:
    file = place / "denoiser.safetensors"
    file.write_bytes(content)
    image = torch.full((3, SIDE, SIDE), 128, dtype=torch.uint8)
    purified = Denoiser.read(file)(image)
    assert (purified.dtype, purified.shape) == (torch.uint8, image.shape)


def checkpoints(place: Path) -> Case:
    """A checkpoint of the embedded engine, and a perturbation of the authors' code."""
    cfg = complete(compose("simclr", SMALL))
    module = build_method(cfg, 32)
    saved: dict[str, Any] = {
        "state_dict": module.state_dict(),
        "hyper_parameters": dict(module.hparams),
        "global_step": 3,
    }
    seeds = {"engine.ckpt": _pickled(saved)}
    seeds["authors.pth"] = _pickled({"model": {"delta": torch.zeros(2, 3, 8, 8)}})

    def in_settings(content: bytes, draw: Any) -> bytes:
        tree = torch.load(io.BytesIO(content), weights_only=True)
        if "hyper_parameters" in tree:
            text = json.dumps(tree["hyper_parameters"]).encode()
            tree["hyper_parameters"] = json.loads(in_json(text, draw))
        elif draw.random() < 0.5:
            tree["model"]["delta"] = draw.choice(
                (*HOSTILE, torch.zeros(2), torch.zeros(0, 3, 8, 8))
            )
        return _pickled(tree)

    def with_code(content: bytes, draw: Any) -> bytes:
        tree = torch.load(io.BytesIO(content), weights_only=True)
        return _pickled({**tree, "code": WritesWhenUnpickled("../outside")})

    return Case(seeds, (in_settings, in_settings, with_code), _read_checkpoint)


def _pickled(content: Any) -> bytes:
    file = io.BytesIO()
    torch.save(content, file)
    return file.getvalue()


def _read_checkpoint(name: str, content: bytes, place: Path) -> None:
    import os

    os.chdir(place)
    file = place / name
    file.write_bytes(content)
    if name == "authors.pth":
        assert _authors_delta(file).ndim == 4
        return
    module, cfg = load_run(file)
    assert module.training is False
    assert cfg.method


def configurations(place: Path) -> Case:
    """The configuration that lies beside a run."""
    cfg = complete(compose("byol", [*SMALL, "+poison=cp", "+monitor=knn"]))
    text = OmegaConf.to_yaml(cfg, resolve=True).encode()
    return Case({"config.yaml": text}, (in_lines, in_lines, in_lines, bomb), _read_configuration)


def _read_configuration(name: str, content: bytes, place: Path) -> None:
    (place / name).write_bytes(content)
    cfg = EngineRun(place).configuration()
    if cfg is not None:
        selection, settings = check(cfg)
        assert selection is not None
        assert settings.method


def studies(place: Path) -> Case:
    """The file of a study."""
    text = OmegaConf.to_yaml(
        {
            "name": "made",
            "base": SMALL,
            "poisons": {
                "random": {"settings": ["+poison=random"], "sampled": True},
                "cp_class": {"settings": ["+poison=cp_class"], "num_surrogates": 2},
            },
            "defences": {"jpeg": ["+defence=jpeg"]},
            "grid": [
                {"poisons": ["none", "random", "cp_class"], "victims": ["simclr"], "seeds": [0, 1]}
            ],
        }
    )
    return Case({"study.yaml": text.encode()}, (in_lines, in_lines, bomb), _read_study)


def _read_study(name: str, content: bytes, place: Path) -> None:
    (place / name).write_bytes(content)
    cells = plan(read_study(str(place / name)))
    for cell in cells.values():
        assert "/" not in cell.name
        assert ".." not in cell.name


def results(place: Path) -> Case:
    """What the cells of a study, and a run, have left behind."""
    draw = np.random.default_rng(0)
    curve = [{"step": 10, "knn_clean_bank": 40.0, "knn_poisoned_bank": 30.0, "epoch": 1}]
    cell = {"name": "c", "kind": "victim", "poison": "cp", "surrogate": "simclr", "needs": {}}
    cell |= {"surrogate_backbone": None, "victim": "simclr", "backbone": "resnet10t"}
    cell |= {"defence": "none", "seed": 0, "digest": "d", "config": "simclr", "overrides": []}
    state = {**cell, "status": "finished", "folder": "runs/c", "call": "x", "time": 1.0}
    state |= {"banks": [bank("clean", draw), bank("poisoned", draw)]}
    state |= {"control": [bank("poisoned", draw)], "result": {"steps": 30, "knn": curve}}
    result = {"poison": "cp", "method": "simclr", "seed": 0, "knn": curve, "surrogate": "byol"}
    result |= {"knn_clean_bank": 40.0, "knn_poisoned_bank": 30.0, "surrogate_steps": 5}
    plan_file = {"settings": {"name": "made"}, "cells": [cell]}
    seeds = {"study.json": plan_file, "c.json": state, "result.json": result}
    texts = {name: json.dumps(value).encode() for name, value in seeds.items()}

    def read(name: str, content: bytes, folder: Path) -> None:
        files = {**texts, name: content}
        if name == "result.json":
            (folder / name).write_bytes(content)
            cfg = {"backbone": {"name": "timm/resnet10t"}, "poison": {"name": "cp"}}
            OmegaConf.save(OmegaConf.create(cfg), folder / "config.yaml")
        else:
            (folder / "cells").mkdir()
            (folder / "study.json").write_bytes(files["study.json"])
            (folder / "cells" / "c.json").write_bytes(files["c.json"])
        found = find(folder)
        assert _summary(found)
        for part in (tables(found.rows), _how(found.rows), _steps(found.rows)):
            assert part is not None
        assert len(leaderboard(found.rows).places) <= len(found.rows)
        assert len(list(csv.DictReader(io.StringIO(as_csv(found.rows))))) == len(found.rows)

    return Case(texts, (in_json, in_json), read)


def images(place: Path) -> Case:
    """Picture files of the formats that people have."""
    pixels = np.random.default_rng(0).integers(0, 256, (40, 30, 3), dtype=np.uint8)
    picture = Image.fromarray(pixels)
    seeds = {}
    formats = {"jpg": "JPEG", "png": "PNG", "tif": "TIFF", "webp": "WEBP", "gif": "GIF"}
    for end, kind in (*formats.items(), ("bmp", "BMP"), ("ppm", "PPM")):
        file = io.BytesIO()
        picture.save(file, kind)
        seeds[f"picture.{end}"] = file.getvalue()
    place.mkdir(parents=True, exist_ok=True)
    write_png(place / "deep.png", pixels.astype(np.uint16) * 257)
    seeds["deep.png"] = (place / "deep.png").read_bytes()
    return Case(seeds, (), _read_image)


def _read_image(name: str, content: bytes, place: Path) -> None:
    folder = place / "in"
    folder.mkdir()
    file = folder / name
    file.write_bytes(content)
    item = RawDataset(_with_transform(load("custom", folder, no_labels=True)[0]), 16)[0]
    assert item.image.shape == (3, 16, 16)
    before, canonical = read_picture(file, Canonical(16, "cover"))
    assert canonical.shape == (3, 16, 16)
    colours = before.colours.astype(np.int64)
    add(before, torch.full((3, 16, 16), EPS), EPS)
    full = 65535 if before.deep else 255
    assert np.abs(before.colours.astype(np.int64) - colours).max() <= full * EPS + 1e-6
    write(before, place / f"out{ending(file, 'png')}")


def _with_transform(dataset: Any) -> Any:
    dataset.transform = lambda picture: picture
    return dataset


CASES: dict[str, Callable[[Path], Case]] = {
    "poison": poisons,
    "checkpoint": checkpoints,
    "configuration": configurations,
    "study": studies,
    "results": results,
    "denoiser": denoisers,
    "image": images,
}
