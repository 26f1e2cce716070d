"""A run of the embedded engine logs where its configuration says, under the names of all hosts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from omegaconf import OmegaConf

from cp_plugin.apps.hydra_app import compose
from cp_plugin.config.settings import UserError
from cp_plugin.engine.loggers import run_loggers
from cp_plugin.engine.run import run

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*does not have many workers.*"),
    pytest.mark.filterwarnings("ignore:.*`isinstance.treespec, LeafSpec.*"),
    pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty"),
]
OF_CALLBACKS = {"cp_model_loss", "cp_noise_loss", "knn_clean_bank", "knn_poisoned_bank"}
"""What the callbacks log in every trainer, whoever built it."""


def test_a_run_logs_where_its_configuration_says(tmp_path: Path, image_folder: Any) -> None:
    images, own = image_folder(), tmp_path / "own"
    loggers = "lightning.pytorch.loggers"
    said = f"+logger={{csv:{{_target_:{loggers}.CSVLogger,save_dir:{own},name:mine}}"
    said += f",board:{{_target_:{loggers}.TensorBoardLogger,save_dir:{own},name:board}}}}"
    small = ["data=custom", f"data.train_path={images}", f"data.val_path={images}"]
    small += ["data.num_workers=0", "backbone.kwargs.channels=[8,8,8,8]", "max_epochs=1"]
    small += ["optimizer.batch_size=6", f"checkpoint.dir={tmp_path / 'runs'}"]
    small += ["+poison=cp", "poison.model_steps=1", "poison.noise_steps=1", "+monitor=knn"]
    folder = Path(run(compose("simclr", [*small, said]))["folder"])
    (written,) = (own / "mine").rglob("metrics.csv")
    assert set(written.read_text().splitlines()[0].split(",")) >= OF_CALLBACKS
    assert (folder / "logs" / "metrics.csv").read_text() == written.read_text()
    assert list((own / "board").rglob("events.out.tfevents.*"))


def test_weights_and_biases_offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("wandb", reason="wandb is not installed: pip install wandb")
    monkeypatch.setenv("WANDB_DIR", str(tmp_path))
    target = "lightning.pytorch.loggers.WandbLogger"
    cfg = OmegaConf.create({"logger": {"_target_": target, "offline": True, "project": "poisons"}})
    *_, found = run_loggers(tmp_path, cfg)
    assert type(found).__name__ == "WandbLogger"


@pytest.mark.parametrize(
    ("own", "says"),
    [
        ({"_target_": "collections.OrderedDict"}, "expected a Lightning logger's _target_"),
        (["csv"], "expected a Lightning logger's _target_"),
        (
            {"_target_": "lightning.pytorch.loggers.CSVLogger", "folder": "logs"},
            r"CSVLogger cannot be made \(.*folder",
        ),
        ({"_target_": "lightning.pytorch.loggers.Nothing"}, "Nothing cannot be made"),
    ],
)
def test_a_mistake_is_one_sentence(own: Any, says: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=says):
        list(run_loggers(tmp_path, OmegaConf.create({"logger": own})))
