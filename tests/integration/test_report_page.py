"""The page of a study: what it holds, and that a browser shows it."""

from __future__ import annotations

import base64
import json
import re
import shutil
import subprocess

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf

from cp_plugin import Poison
from cp_plugin.apps.hydra_app import compose
from cp_plugin.apps.report import report
from cp_plugin.apps.report.rows import find
from cp_plugin.apps.report.scenes import settings
from cp_plugin.apps.study.plan import plan
from cp_plugin.apps.study.settings import parse
from cp_plugin.apps.study.state import FAILED, FINISHED, Folder, write
from cp_plugin.attack.perturbation import Perturbation
from cp_plugin.data import Photos
from cp_plugin.engine.methods import build_method
from cp_plugin.engine.settings import complete
from tests.support.results import bank

VICTIMS, POISONS, SEEDS = ("simclr", "byol"), ("none", "random", "cp_class"), (0, 1)
SMALL = ["backbone.kwargs.channels=[8,8,8,8]", "data.num_workers=0"]


@pytest.fixture(scope="module")
def a_study(tmp_path_factory):
    """The folder of a study as its runs would leave it; the networks are untrained."""
    folder = Folder(tmp_path_factory.mktemp("study"))
    settings = parse(
        {
            "name": "made",
            "base": SMALL,
            "poisons": {
                "random": {"settings": ["+poison=random"], "drawn": True},
                "cp_class": {"settings": ["+poison=cp_class"]},
            },
            "grid": [{"poisons": [*POISONS], "victims": [*VICTIMS], "seeds": [*SEEDS]}],
        }
    )
    cells = plan(settings)
    plain = [cell.plain() for cell in cells.values()]
    write(folder.path / "study.json", {"settings": {"name": "made"}, "cells": plain})
    draw = np.random.default_rng(3)
    names = tuple(Photos(train=True, patches=1).classes)
    configurations = {victim: complete(compose(victim, SMALL)) for victim in VICTIMS}
    for number, cell in enumerate(cells.values()):
        run = folder.runs / cell.name
        run.mkdir(parents=True)
        cfg = configurations[cell.config].copy()
        cfg.seed = cell.seed
        OmegaConf.save(cfg, run / "config.yaml", resolve=True)
        if cell.kind != "craft":
            torch.manual_seed(number)
            _checkpoint(cfg, run / "last.ckpt")
        if cell.kind == "craft" or cell.poison == "random":
            delta = Perturbation.uniform(12, (3, 32, 32), 8 / 255)
            Poison(delta, "class", classes=names).save(run / "poison.safetensors")
        if cell.name == "victim-byol-default-random-none-1":
            folder.note(cell, FAILED, "call", reason="<b>too hot</b>")
            continue
        folder.note(cell, FINISHED, "call", **_result(cell, folder, run, draw))
    return folder.path


def _checkpoint(cfg, path):
    module = build_method(cfg, 32)
    saved = {"state_dict": module.state_dict(), "hyper_parameters": dict(module.hparams)}
    torch.save(saved, path)


def _result(cell, folder, run, draw):
    curve = [
        {"step": step, "knn_clean_bank": draw.uniform(20, 80), "epoch": step}
        | ({} if cell.poison == "none" else {"knn_poisoned_bank": draw.uniform(20, 80)})
        for step in (10, 20, 30)
    ]
    found = {"folder": str(run.relative_to(folder.path)), "result": {"steps": 30, "knn": curve}}
    if cell.kind == "craft":
        return found
    names = ["clean"] if cell.kind == "clean" else ["clean", "poisoned"]
    control = {"control": [bank("poisoned", draw)]} if cell.kind == "victim" else {}
    return found | {"banks": [bank(name, draw) for name in names]} | control


@pytest.fixture(scope="module")
def page(a_study):
    html, _, _ = report(a_study)
    return html


def test_the_page_needs_nothing_else(page):
    text = page.read_text(encoding="utf8")
    assert not re.findall(r"(?:src|href)=\"(?!data:|#)[^\"]*\"", text)
    assert "@import" not in text
    images = re.findall(r'src="data:([^;]+);base64,([^"]+)"', text)
    # 2 curves, 2 poisons on images, 2 spectra and their profiles, 2 of saliency, 3 maps of features
    assert [kind for kind, _ in images].count("image/png") == 9
    assert [kind for kind, _ in images].count("image/svg+xml") == 3
    assert all(len(base64.b64decode(content)) > 1000 for _, content in images)


def test_the_perturbations_are_described(page):
    """Of noise, one delta a class: no class is mistaken, and it is noise to untrained encoders."""
    text = page.read_text(encoding="utf8").split('id="delta"')[1].split("</table>")[0]
    lines = [re.findall(r"<td>([^<]*)</td>", line) for line in text.split("<tr>")[2:]]
    assert [line[0] for line in lines] == ["random", "cp_class (simclr)"]
    for _, rms, at_bound, grey, centre, _, _, told, by_clean, by_victim in lines:
        assert float(rms) == pytest.approx(3**-0.5, abs=0.02)
        assert float(at_bound) == pytest.approx(0.01, abs=0.006)
        assert float(grey) == pytest.approx(1 / 3, abs=0.03)
        assert float(centre) == pytest.approx(0.25, abs=0.03)
        assert told.startswith("100.0 (")
        assert abs(float(by_clean)) < 0.1
        assert abs(float(by_victim.split(" (")[0])) < 0.1


def test_what_has_no_result_is_named_with_its_reason(page):
    text = page.read_text(encoding="utf8")
    assert "1 of 14 cells have no result" in text
    assert "&lt;b&gt;too hot&lt;/b&gt;" in text
    assert "- `victim-byol-default-random-none-1`: <b>too hot</b>" in page.with_suffix(
        ".md"
    ).read_text(encoding="utf8")


def test_the_tables_hold_what_the_cells_hold(a_study, page):
    def accuracy(name):
        cell = json.loads((a_study / "cells" / f"{name}.json").read_text())
        return cell["control"][0]["knn"]["accuracy"]

    values = [accuracy(f"victim-simclr-default-cp_class-simclr-none-{seed}") for seed in SEEDS]
    shown = f"{np.mean(values):.1f} ± {np.std(values, ddof=1):.1f}"
    text = page.read_text(encoding="utf8")
    assert shown in text.split("control: kNN")[1].split("</table>")[0]
    assert shown in page.with_suffix(".md").read_text().split("control: kNN")[1]


def test_shared_settings_stand_apart_from_those_of_single_runs(a_study):
    shared, own = settings(find(a_study).folders)
    assert shared["backbone.kwargs.channels"] == "[8, 8, 8, 8]"
    assert shared["augmentations.0.crop_size"] == "32"
    assert own["clean-byol-default-1"]["method"] == "byol"
    assert own["clean-byol-default-1"]["seed"] == "1"
    assert own["clean-simclr-default-0"]["method_kwargs.temperature"] == "0.5"


def test_a_folder_of_runs_is_reported_too(tmp_path):
    run, craft = tmp_path / "a" / "victim", tmp_path / "a" / "craft"
    cfg = complete(compose("simclr", SMALL))
    for folder, poison, result in (
        (craft, {"name": "cp_class"}, {"poison": "cp_class", "surrogate_steps": 9}),
        (
            run,
            {"name": "inject", "path": str(craft / "poison.safetensors")},
            {"poison": "inject", "surrogate_steps": 9, "surrogate": "byol", "method": "simclr"}
            | {"seed": 3, "knn_clean_bank": 61.0, "knn_poisoned_bank": 52.0}
            | {"knn": [{"step": 1, "knn_clean_bank": 61.0}], "k": 20, "temperature": 0.07},
        ),
    ):
        folder.mkdir(parents=True)
        cfg.poison = poison
        OmegaConf.save(cfg, folder / "config.yaml")
        (folder / "result.json").write_text(json.dumps(result))
    (found,) = find(tmp_path).rows
    assert (found.label, found.victim, found.seed) == ("cp_class (byol)", "simclr", 3)
    assert found.accuracies == {"knn_clean": 61.0, "knn_poisoned": 52.0}
    assert found.backbone == "resnet18"
    html, text, _ = report(tmp_path, tmp_path / "out")
    assert html.parent == text.parent == tmp_path / "out"
    assert "| cp_class (byol) | 61.0 | 61.0 | 61.0 (simclr) |" in text.read_text()


CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("chrome")
FLAGS = [
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--disable-sync",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--enable-logging=stderr",
    "--virtual-time-budget=3000",
]
MEASURE = """<script>
addEventListener("load", () => {
  const broken = [...document.images].filter(image => !image.naturalWidth).length;
  const root = document.documentElement;
  console.info("found", innerWidth, root.scrollWidth, document.images.length, broken);
});
</script></body>"""


@pytest.mark.skipif(CHROMIUM is None, reason="Chromium is not installed")
@pytest.mark.parametrize("width", [1280, 390])
def test_a_browser_shows_the_page_without_errors(page, tmp_path, width):
    measured = page.read_text(encoding="utf8").replace("</body>", MEASURE)
    (tmp_path / "page.html").write_text(measured, "utf8")
    # A window cannot be narrower than 500 pixels, a frame can.
    frame = f'<iframe src="page.html" width="{width}" height="2000" style="border: 0"></iframe>'
    (tmp_path / "frame.html").write_text(f"<!doctype html>{frame}", "utf8")
    done = subprocess.run(
        [
            CHROMIUM,
            *FLAGS,
            f"--window-size={width + 40},2100",
            f"--user-data-dir={tmp_path / 'profile'}",
            f"--screenshot={tmp_path / 'page.png'}",
            (tmp_path / "frame.html").as_uri(),
        ],
        capture_output=True,
        text=True,
        timeout=120,
    )
    console = [line for line in done.stderr.splitlines() if "CONSOLE" in line]
    assert len(console) == 1, console
    inner, scrolled, images, broken = map(
        int, re.findall(r'"found (\d+) (\d+) (\d+) (\d+)"', console[0])[0]
    )
    assert (inner, images, broken) == (width, 12, 0)
    assert scrolled <= width
