"""Rows in a file, and snapshots that write what changed: the poison of rows in memory, bit for bit.

What is large is said by two limits, which are set to nothing here.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from torch.utils.data import DataLoader

from cp_plugin import PoisonLoop
from cp_plugin.attack import perturbation, start, tensor_file
from cp_plugin.attack.poison_file import Poison
from cp_plugin.attack.row_file import RowFile
from cp_plugin.callbacks import CraftPoison
from cp_plugin.config.settings import UserError
from tests.support.small_runs import TWO_CROPS, Pictures, Small

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*does not have many workers.*"),
    pytest.mark.filterwarnings("ignore:.*`isinstance.treespec, LeafSpec.*"),
    pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty"),
]
COUNT, BATCH = 40, 4
ROW = 3 * 16 * 16
SETTINGS = {"rounds": 5, "model_steps": 2, "noise_steps": 2, "pgd_steps": 1, "seed": 3}
SETTINGS |= {"dtype": "int8", "step_size": 0.02}


class Saving(pl.Callback):
    """Saves a checkpoint after every step and notes how large the file of rows is then."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.sizes = folder, []

    def on_train_batch_end(self, trainer: Any, *args: Any) -> None:
        trainer.save_checkpoint(self.folder / f"step={trainer.global_step}.ckpt")
        self.sizes += [file.stat().st_size for file in self.folder.glob("*.rows")]


@pytest.fixture
def large(monkeypatch: pytest.MonkeyPatch) -> Callable[[bool], None]:
    """Makes every perturbation a large one."""

    def make(in_memory: bool) -> None:
        monkeypatch.setattr(perturbation, "LEAST_SAVED_BY_ROWS", 0)
        if not in_memory:
            monkeypatch.setattr(start, "LARGEST_IN_MEMORY", 0)
            monkeypatch.setattr(tensor_file, "BY_ROWS", 0)

    return make


def craft(folder: Path, path: Path | None = None, saving: Saving | None = None) -> Poison:
    pl.seed_everything(0, verbose=False)
    trainer = pl.Trainer(
        **{"accelerator": "cpu", "devices": 1, "max_epochs": 3, "logger": False},
        **{"enable_progress_bar": False, "enable_model_summary": False},
        **{"enable_checkpointing": False, "default_root_dir": folder},
        callbacks=[CraftPoison(dir=str(folder), **SETTINGS), *([saving] if saving else [])],
    )
    trainer.fit(Small(), DataLoader(Pictures(TWO_CROPS, COUNT), BATCH), ckpt_path=path)
    found = Poison.load(folder / "poison.safetensors")
    (folder / "poison.safetensors").unlink()
    return found


def equal(one: Poison, other: Poison) -> bool:
    assert one.keys.tolist() == other.keys.tolist()
    return torch.equal(one.perturbation.stored, other.perturbation.stored)


@pytest.mark.parametrize("in_memory", [False, True])
def test_a_large_craft_is_that_of_a_small_one_and_goes_on_from_any_state(
    tmp_path: Path, large: Callable[[bool], None], in_memory: bool
) -> None:
    small = craft(tmp_path / "small")
    large(in_memory)
    folder = tmp_path / "large"
    saving = Saving(folder)
    whole = craft(folder, saving=saving)
    assert equal(whole, small)
    assert isinstance(whole.perturbation.rows, RowFile) != in_memory
    (rows,) = folder.glob("*.rows")
    # After a noise phase of 2 batches those alone are written anew.
    steps = [after - before for before, after in itertools.pairwise(saving.sizes)]
    assert saving.sizes[0] == COUNT * ROW
    assert 0 < max(steps) <= 2 * BATCH * ROW
    # Where the run itself goes on, from its newest state and from an older one, …
    for number in (9, 4):
        assert equal(craft(folder, folder / f"step={number}.ckpt"), whole), number
    assert list(folder.glob("*.rows")) == [rows]
    # … where a large one goes on in another folder, and where rows were in memory once.
    before = rows.read_bytes()
    assert equal(craft(tmp_path / "other", folder / "step=5.ckpt"), whole)
    assert rows.read_bytes() == before


def test_a_run_without_checkpoints_leaves_its_poison_alone(
    tmp_path: Path, large: Callable[[bool], None]
) -> None:
    large(False)
    (tmp_path / "delta-0123abcd.rows").write_bytes(b"of a run that was killed before it saved")
    craft(tmp_path)
    assert not list(tmp_path.glob("*.rows"))


def test_a_snapshot_whose_rows_are_gone_or_cut_is_refused(
    tmp_path: Path, large: Callable[[bool], None]
) -> None:
    large(False)
    craft(tmp_path, saving=Saving(tmp_path))
    (rows,) = tmp_path.glob("*.rows")
    with rows.open("rb+") as file:
        file.truncate(ROW)
    with pytest.raises(UserError, match=r"needs the rows in .*shorter"):
        craft(tmp_path, tmp_path / "step=3.ckpt")
    rows.unlink()
    with pytest.raises(UserError, match=r"needs the rows in .*No such file"):
        craft(tmp_path, tmp_path / "step=3.ckpt")


def test_a_loop_of_ones_own_goes_on_with_rows_in_a_file(
    tmp_path: Path, large: Callable[[bool], None]
) -> None:
    def looped(folder: Path, state: dict[str, Any] | None = None) -> tuple[Poison, list[Any]]:
        pl.seed_everything(0, verbose=False)
        module, states = Small(), []
        module.trainer = None
        poison = PoisonLoop(
            DataLoader(Pictures(TWO_CROPS, COUNT), BATCH), module, dir=str(folder), **SETTINGS
        )
        optimizer = torch.optim.SGD(module.parameters(), lr=0.05)
        if state is not None:
            poison.load_state_dict(state["poison"])
            module.load_state_dict(state["module"])
        while not poison.finished:
            for batch in poison:
                poison.backward(module.training_step(batch, 0))
                optimizer.step()
                optimizer.zero_grad()
            module_state = {name: one.clone() for name, one in module.state_dict().items()}
            states.append({"poison": poison.state_dict(), "module": module_state})
        return poison.poison(), states

    settings = dict(SETTINGS)
    SETTINGS["rounds"] = 10  # two epochs
    try:
        small, _ = looped(tmp_path / "small")
        large(False)
        whole, states = looped(tmp_path / "large")
        assert equal(whole, small)
        assert len(states) == 2
        assert "tensors" not in states[0]["poison"]
        # Both leave the noise batches where they are, so that the second epoch's are the first's.
        resumed, _ = looped(tmp_path / "large", states[0])
        again, _ = looped(tmp_path / "large", states[0])
        assert equal(resumed, again)
        assert len(list((tmp_path / "large").glob("*.rows"))) == 1
    finally:
        SETTINGS.update(settings)
