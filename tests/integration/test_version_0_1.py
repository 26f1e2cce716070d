"""Poison files, studies and configurations of version 0.1 go on working; see its `make.py`."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from hydra import compose, initialize_config_dir
from hydra.utils import instantiate
from PIL import Image
from torchvision.transforms import PILToTensor

from cp_plugin.apps.export import export
from cp_plugin.apps.study.plan import plan
from cp_plugin.apps.study.settings import parse, read
from cp_plugin.attack.inject import inject
from cp_plugin.attack.poison_file import Poison
from cp_plugin.config.selection import Selection
from cp_plugin.config.settings import CraftConfig
from cp_plugin.data import Photos
from cp_plugin.integrations.hydra_plugin import Activation

FILES = Path(__file__).parent.parent / "fixtures" / "version_0_1"
DIGESTS = json.loads((FILES / "digests.json").read_text(encoding="utf8"))


def digest(image: Any) -> str:
    return hashlib.sha256(np.ascontiguousarray(image).tobytes()).hexdigest()[:16]


def test_the_files_are_small() -> None:
    assert sum(file.stat().st_size for file in FILES.rglob("*") if file.is_file()) < 100_000


@pytest.mark.parametrize("granularity", ["class", "sample"])
def test_an_old_poison_is_in_the_same_images_with_the_same_pixels(granularity: str) -> None:
    poison = Poison.load(FILES / f"{granularity}.safetensors")
    assert (poison.granularity, poison.fraction) == (granularity, 0.5)
    data = Photos(train=True, patches=2)
    data.transform = PILToTensor()
    injected = inject(data, poison)
    found = [digest(injected[row][0].numpy()) for row in range(len(data))]
    assert found == DIGESTS[granularity]["injected"]
    clean = [digest(image.transpose(2, 0, 1)) for image in data.data]
    assert sum(one == other for one, other in zip(found, clean, strict=True)) == len(data) / 2


@pytest.mark.parametrize("granularity", ["class", "sample"])
def test_an_old_poison_exports_the_same_files(granularity: str, tmp_path: Path) -> None:
    data = Photos(train=True, patches=2)
    for row, (image, label) in enumerate(zip(data.data, data.targets, strict=True)):
        path = tmp_path / "clean" / data.classes[label] / f"{row:02}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(path)
    out = tmp_path / "out"
    export(FILES / f"{granularity}.safetensors", out, tmp_path / "clean")
    found = {
        str(path.relative_to(out)): digest(np.array(Image.open(path)).transpose(2, 0, 1))
        for path in out.rglob("*.png")
    }
    assert found == DIGESTS[granularity]["exported"]


def test_an_old_study_has_the_cells_of_one_in_todays_words() -> None:
    values = yaml.safe_load((FILES / "study.yaml").read_text(encoding="utf8"))
    poisons = values["poisons"]
    poisons["random"]["sampled"] = poisons["random"].pop("drawn")
    poisons["cp_class"]["num_surrogates"] = poisons["cp_class"].pop("chain")
    cells = plan(read(str(FILES / "study.yaml")))
    assert cells == plan(parse({"name": "study", **values}))
    assert sum(cell.kind == "craft" for cell in cells.values()) == 3


def test_an_old_group_activates_the_poison_it_describes() -> None:
    with initialize_config_dir(str(FILES), version_base="1.3"):
        cfg = compose(overrides=["+poison=mine"], return_hydra_config=True)
    assert isinstance(instantiate(cfg.hydra.callbacks.cp_plugin), Activation)
    expected = CraftConfig(eps=4 / 255, granularity="class", rounds=10)
    assert Selection.read(cfg) == dataclasses.replace(
        Selection.of(None, None), name="cp_class", poison=expected
    )
