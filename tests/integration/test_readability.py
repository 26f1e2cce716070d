"""Readability: the same surrogate on the same views, but for delta."""

import json

import pytest
import torch
from typer.testing import CliRunner

from cp_plugin.apps.cli import app
from cp_plugin.apps.evaluate_run import read_by_surrogates
from cp_plugin.apps.hydra_app import compose
from cp_plugin.attack.perturbation import Perturbation
from cp_plugin.attack.poison_file import Poison
from cp_plugin.config.settings import UserError
from cp_plugin.data import class_names
from cp_plugin.engine.readability import RANDOM, readability
from cp_plugin.engine.run import check, prepare, run

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*does not have many workers.*"),
    pytest.mark.filterwarnings("ignore:.*`isinstance.treespec, LeafSpec.*"),
    pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty"),
]


@pytest.fixture
def settings(tmp_path, image_folder):
    images = image_folder()
    return [
        "data=custom",
        f"data.train_path={images}",
        "data.num_workers=0",
        "backbone.kwargs.channels=[8,8,8,8]",
        "+backbone.kwargs.stem_stride=2",
        "optimizer.batch_size=6",
        "optimizer.name=adamw",
        "optimizer.lr=0.5",
        "max_epochs=1",
        f"checkpoint.dir={tmp_path}",
    ]


def painted(levels, names):
    """A poison that tints the images of each of three classes in a colour of their own."""
    delta = (2 * torch.eye(3) - 1)[:, :, None, None].expand(3, 3, 32, 32) * levels / 255
    return Poison(Perturbation(delta.contiguous(), max(levels, 1) / 255), "class", classes=names)


def classes(cfg):
    return tuple(class_names(prepare(cfg.copy()).train))


def test_a_poison_that_does_nothing_is_read_as_clean_images_are(settings):
    cfg = check(compose("simclr", settings))[1]
    found = readability(cfg, painted(0, classes(cfg)), steps=4, seeds=[0, 1])
    assert found.drops() == (0, 0)
    assert found.scatter() == 0
    assert 0 not in found.drops(RANDOM)


def test_what_gives_the_classes_away_is_read_by_a_classifier(settings):
    cfg = check(compose("supervised", settings))[1]
    found = readability(cfg, painted(96, classes(cfg)), steps=40, seeds=[0])
    assert found.mean() > 0.1 > found.mean(RANDOM)
    assert found.scatter() is None


def test_a_poison_is_read_by_the_surrogate_of_its_run(settings, tmp_path):
    made = run(compose("simclr", [*settings, "+poison=random", "poison.granularity=class"]))
    file = f"{made['folder']}/poison.safetensors"
    call = CliRunner().invoke(
        app, ["evaluate", file, "--readability", "--steps", "4", "--seeds", "1", "--json"]
    )
    assert call.exit_code == 0, call.output
    read = json.loads(call.stdout)
    assert [row["images"] for row in read["rows"]] == ["clean", "poison", "random"]
    assert read["rows"][0]["drop"] == 0
    table = CliRunner().invoke(
        app, ["evaluate", file, "--readability", "--steps", "4", "--seeds", "1"]
    )
    assert "lower than" in table.stdout


def test_a_poison_without_a_run_needs_one(tmp_path):
    with pytest.raises(UserError, match="--run DIR"):
        read_by_surrogates(tmp_path / "poison.safetensors")


def test_too_few_steps_are_refused(settings):
    cfg = check(compose("simclr", settings))[1]
    with pytest.raises(UserError, match="at least 4 steps"):
        readability(cfg, painted(8, ("a", "b", "c")), steps=3)
