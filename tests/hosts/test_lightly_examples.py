"""Lightly's own example modules, run as they stand, with a poison crafted while they train.

The files are those of a checkout of Lightly, whose package comes without them; nothing of them is
here. What they ask of torchvision (a download), of the loader (batches of 256, eight workers) and
of the trainer (ten epochs) is made small around them. `support/lightly_modules.py` has modules in
their style, for every machine.
"""

from __future__ import annotations

import os
import runpy
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning
import torch
import torchvision

from cp_plugin import CraftPoison, Poison
from cp_plugin.config.settings import UserError
from cp_plugin.data import Photos
from tests.support.lightly_examples import NOTES, REFUSED, SERVED

ROOT = Path(os.environ.get("LIGHTLY_ROOT", "~/lightly")).expanduser()
EXAMPLES = sorted((ROOT / "examples" / "pytorch_lightning").glob("*.py"))
FILES = [file for file in EXAMPLES if file.stem not in NOTES]
BATCH = 4
LARGER = {"vicreg": 12}
"""Batches of those whose loss is infinite in eval mode after two steps on four images."""
SAID = {"detcon": "the transform is a function, .* that cannot be looked into"}
"""What is said of those that are refused."""
pytestmark = [
    pytest.mark.filterwarnings("ignore"),  # of the examples' own uses of what is deprecated
    pytest.mark.skipif(
        not EXAMPLES,
        reason="no examples of Lightly: `git clone https://github.com/lightly-ai/lightly` and set "
        "LIGHTLY_ROOT to the folder",
    ),
]


def small_photos(*_: Any, transform: Any = None, **__: Any) -> Any:
    return Photos(train=True, patches=1, transform=transform)


def test_every_example_is_in_the_list() -> None:
    assert {file.stem for file in EXAMPLES} == {*SERVED, *REFUSED, *NOTES}


@pytest.mark.slow
@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_an_example_as_it_stands(
    file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = {"rounds": 1, "model_steps": 2, "noise_steps": 1, "pgd_steps": 1, "seed": 0}
    own_loader, own_trainer = torch.utils.data.DataLoader, pytorch_lightning.Trainer

    class Loader(own_loader):
        def __init__(self, dataset: Any, **given: Any) -> None:
            size = LARGER.get(file.stem, BATCH)
            super().__init__(dataset, **{**given, "batch_size": size, "num_workers": 0})

    class Crafting(own_trainer):
        def __init__(self, **given: Any) -> None:
            quiet = ("logger", "enable_checkpointing", "enable_progress_bar")
            given |= {"accelerator": "cpu", "strategy": "auto", "default_root_dir": tmp_path}
            given |= dict.fromkeys((*quiet, "enable_model_summary"), False)
            craft = CraftPoison(dir=str(tmp_path), **settings)
            super().__init__(**given, callbacks=[craft])

    for name in ("CIFAR10", "VOCDetection"):
        monkeypatch.setattr(torchvision.datasets, name, small_photos)
    monkeypatch.setattr(torch.utils.data, "DataLoader", Loader)
    monkeypatch.setattr(pytorch_lightning, "Trainer", Crafting)
    torch.manual_seed(0)
    if file.stem in REFUSED:
        with pytest.raises(UserError, match=SAID[file.stem]):
            runpy.run_path(str(file))
        return
    runpy.run_path(str(file))
    poison = Poison.load(tmp_path / "poison.safetensors")
    assert poison.info["host"] == "lightly"
    assert 0 < poison.perturbation.largest() <= 8 / 255 + 1e-6
