"""A run that was killed between its last checkpoint and its result: the same command ends it."""

import json

import pytest
import torch
from safetensors.torch import load_file

from cp_plugin.apps.hydra_app import compose
from cp_plugin.engine.run import run

TINY = "backbone.kwargs={layers:[1,1,1,1],channels:[8,8,8,8],stem_type:deep,stem_width:4}"
SHORT = ("poison.rounds=2", "poison.model_steps=2", "poison.noise_steps=1", "max_epochs=100")
RUNS = {
    "cp_class": ("simclr", ("+poison=cp_class", *SHORT)),
    "cp": ("simclr", ("+poison=cp", "poison.pgd_steps=1", *SHORT)),
    "tap": ("supervised", ("+poison=tap", "poison.pgd_steps=1", "max_epochs=1")),
    "random": ("simclr", ("+poison=random", "max_epochs=1")),
    "none": ("simclr", ("+poison=none", "max_epochs=1", "+monitor=knn")),
}


@pytest.mark.parametrize("name", RUNS)
@pytest.mark.filterwarnings("ignore:.*does not have many workers.*")
@pytest.mark.filterwarnings("ignore:Checkpoint directory")
@pytest.mark.filterwarnings("ignore:Experiment logs directory")
@pytest.mark.filterwarnings("ignore:.*LeafSpec.*:FutureWarning")
def test_the_same_command_ends_it(name, tmp_path):
    method, overrides = RUNS[name]

    def command():
        settings = (TINY, "data=photos", "data.num_workers=0", "augmentations=crops", "seed=0")
        again = ("auto_resume.enabled=True", "checkpoint.frequency=1", f"checkpoint.dir={tmp_path}")
        small = "optimizer.batch_size=256"
        return run(compose(method, [*settings, small, *again, *overrides]))

    before = command()
    (folder,) = {path.parent for path in tmp_path.rglob("result.json")}
    poison = folder / "poison.safetensors"
    delta = load_file(poison)["delta"] if poison.exists() else None
    (folder / "result.json").unlink()
    poison.unlink(missing_ok=True)
    after = command()
    assert json.loads((folder / "result.json").read_text())["steps"] == before["steps"]
    assert after["poison"] == before["poison"]
    if delta is not None:
        assert torch.equal(load_file(poison)["delta"], delta)
