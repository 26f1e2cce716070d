"""`backbone.whiten` in whole runs: fitted to clean images, the same everywhere, saved."""

from pathlib import Path

import pytest
import torch

from cp_plugin.apps.engine_runs import load_run
from cp_plugin.apps.evaluate_run import evaluate
from cp_plugin.apps.hydra_app import compose
from cp_plugin.engine.run import run

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*does not have many workers.*"),
    pytest.mark.filterwarnings("ignore:.*`isinstance.treespec, LeafSpec.*"),
    pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty"),
]


@pytest.fixture
def trained(tmp_path, image_folder):
    images = image_folder()
    small = [
        "data=custom",
        f"data.train_path={images}",
        f"data.val_path={images}",
        "data.num_workers=0",
        "backbone.kwargs.channels=[8,8,8,8]",
        "backbone.whiten=2",
        "optimizer.batch_size=6",
        "max_epochs=1",
        f"checkpoint.dir={tmp_path}",
    ]

    def train(method, *overrides):
        return Path(run(compose(method, [*small, *overrides]))["folder"])

    return train


def test_surrogate_and_victim_see_through_the_same_filters(trained):
    craft = trained("mocov2plus", "+poison=cp", "poison.model_steps=1", "poison.noise_steps=1")
    poison = f"poison.path={craft / 'poison.safetensors'}"
    victim = trained("supervised", "augmentations=cifar_paper", "+poison=inject", poison, "seed=9")
    surrogate, _ = load_run(craft)
    filters = surrogate.backbone.whitening.weight
    assert filters.abs().sum() > 0
    assert torch.equal(filters, surrogate.backbone_momentum.whitening.weight)
    assert torch.equal(filters, load_run(victim)[0].backbone.whitening.weight)


def test_the_classifier_of_a_supervised_run_is_tested(trained):
    clean, *others = evaluate(trained("supervised", "+poison=random"))
    assert 0 <= clean["classifier"] <= 100
    assert all("classifier" not in row for row in others)
    assert "classifier" not in evaluate(trained("simclr"))[0]
