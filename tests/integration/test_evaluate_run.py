"""The control's curve: a clean run's checkpoints on the poisoned bank of another run."""

from pathlib import Path

import pytest

from cp_plugin.apps.evaluate_run import control_curve, evaluate, poison_of
from cp_plugin.apps.hydra_app import compose
from cp_plugin.config.settings import UserError
from cp_plugin.engine.run import run

KEEP = "+checkpoint.keep_prev=true"
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*does not have many workers.*"),
    pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty"),
    pytest.mark.filterwarnings("ignore:.*`isinstance.treespec, LeafSpec.*"),
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
        "optimizer.batch_size=6",
        f"checkpoint.dir={tmp_path}",
    ]

    def train(*overrides):
        return Path(run(compose("simclr", [*small, *overrides]))["folder"])

    return train


def test_the_controls_curve_is_the_clean_encoder_at_every_checkpoint(trained):
    clean = trained("+poison=none", "max_epochs=4", "checkpoint.frequency=2", KEEP)
    poison = poison_of(trained("+poison=random", "poison.eps=64/255", "max_epochs=1"))
    curve = control_curve(clean, poison)
    assert [row["step"] for row in curve] == [4, 8]
    for row, name in zip(curve, ("epoch=1.ckpt", "last.ckpt"), strict=True):
        _, poisoned = evaluate(clean / name, poison, probe="none")
        assert row["knn_control"] == poisoned["knn"]["accuracy"]


def test_a_run_that_kept_only_its_last_checkpoint_has_no_curve(trained):
    clean = trained("+poison=none", "max_epochs=2", "checkpoint.frequency=1")
    poison = poison_of(trained("+poison=random", "max_epochs=1"))
    assert control_curve(clean, poison) == []


def test_every_probe_says_its_protocol(trained):
    clean = trained("+poison=none", "max_epochs=1")
    (row,) = evaluate(clean, probe="paper")
    assert row["linear"]["protocol"] == "cosine"
    assert row["linear_paper"]["protocol"] == "paper"
    assert row["linear_paper"]["epochs"] == 100
    assert "linear_paper" not in evaluate(clean)[0]
    with pytest.raises(UserError, match="probe must be one of cosine, paper, none; got 'theirs'"):
        evaluate(clean, probe="theirs")
