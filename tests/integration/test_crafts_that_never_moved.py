"""A craft that did not optimise its perturbation writes no poison, or says how much it lacks."""

import json
import logging

import lightning.pytorch
import pytest
import torch
from lightly.transforms.simclr_transform import SimCLRTransform
from lightning.pytorch import Callback
from torch.utils.data import DataLoader

from cp_plugin import CraftPoison, Poison, PoisonLoop
from cp_plugin.config.settings import UserError
from cp_plugin.data import Photos
from tests.support.own_module import loader, simclr, trainer

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*does not have many workers.*"),
    pytest.mark.filterwarnings("ignore:.*logging interval.*"),
    pytest.mark.filterwarnings("ignore:.*`isinstance.treespec, LeafSpec.*"),
    pytest.mark.filterwarnings("ignore:.*overfit.*"),
]
FILE = "poison.safetensors"


def data():
    return Photos(train=True, patches=2, transform=SimCLRTransform(input_size=32, gaussian_blur=0))


def craft(folder, module=None, batches=None, callbacks=(), more=None, **settings):
    """Fit on 24 images in 3 batches of 8, a noise phase after each epoch."""
    poison = CraftPoison(**{"rounds": 2, "pgd_steps": 1, "dir": str(folder)} | settings)
    fitting = trainer(
        lightning.pytorch, folder, poison, *callbacks, **{"max_epochs": 4} | (more or {})
    )
    fitting.fit(module or simclr(lightning.pytorch), batches or loader(data(), 8))
    return poison


class Stop(Callback):
    def on_train_batch_end(self, trainer, *_):
        trainer.should_stop = True


@pytest.mark.parametrize(
    ("settings", "more"),
    [
        ({}, {"max_epochs": -1, "max_steps": 2}),
        ({"model_steps": 7}, {"max_epochs": 2}),
        ({"model_steps": 3}, {"max_epochs": 2, "limit_train_batches": 1}),
        ({"model_steps": 3}, {"max_epochs": 1, "overfit_batches": 2}),
        ({"model_steps": 3}, {"max_epochs": 2, "accumulate_grad_batches": 3}),
    ],
    ids=["max_steps", "few epochs", "limit_train_batches", "overfit_batches", "accumulated"],
)
def test_a_training_without_a_noise_phase_is_refused_before_it_starts(settings, more, tmp_path):
    module = simclr(lightning.pytorch)
    with pytest.raises(UserError, match=r"would end after \d optimiser steps, and the first noise"):
        craft(tmp_path, module, more=more, **settings)
    assert module.seen == []
    assert not (tmp_path / FILE).exists()


def test_a_training_that_is_stopped_early_writes_nothing(tmp_path):
    with pytest.raises(UserError, match="ended after 1 model steps, before the first noise phase"):
        craft(tmp_path, callbacks=[Stop()], more={"min_epochs": 0, "limit_val_batches": 0})
    assert not (tmp_path / FILE).exists()


@pytest.mark.parametrize("limit", [2, 0.7])
def test_a_round_has_the_batches_that_the_trainer_runs(limit, tmp_path):
    craft(tmp_path, more={"limit_train_batches": limit})
    schedule = json.loads(Poison.load(tmp_path / FILE).info["schedule"])
    assert (schedule["model_steps"], schedule["noise_steps"]) == (2, 2)
    assert (schedule["surrogate_steps_done"], schedule["noise_steps_done"]) == (4, 4)


def failing(step, when):
    """Return a module whose loss is not a number at a step, in training or in eval mode."""
    module = simclr(lightning.pytorch)
    own, count = module.training_step, [0]

    def training_step(batch, batch_idx):
        loss = own(batch, batch_idx)
        if module.training == (when == "model"):
            count[0] += 1
            return loss * float("nan") if count[0] == step else loss
        return loss

    module.training_step = training_step
    return module


def test_the_first_loss_of_the_model_that_is_not_finite_ends_it(tmp_path):
    module = failing(2, "model")
    with pytest.raises(UserError, match="at model step 2 is nan"):
        craft(tmp_path, module)
    assert len(module.seen) == 2
    assert not (tmp_path / FILE).exists()


def test_the_first_loss_of_a_noise_phase_that_is_not_finite_ends_it(tmp_path):
    module = failing(3 + 2 * 2 - 1 + 1, "noise")  # 3 steps look at the branches and the labels
    with pytest.raises(UserError, match="after model step 3, batch 2, step 2, is nan"):
        craft(tmp_path, module, pgd_steps=2)
    assert not (tmp_path / FILE).exists()


def test_gradients_that_are_no_numbers_write_nothing(tmp_path):
    module = simclr(lightning.pytorch)
    own = module.training_step

    def nan_gradient(batch, batch_idx):
        roots = sum((view - view).square().sum().sqrt() for view in batch[0])
        return own(batch, batch_idx) + (0 if module.training else 0 * roots)

    module.training_step = nan_gradient
    with pytest.raises(UserError, match="no row of the perturbation has moved in 6 noise steps"):
        craft(tmp_path, module)
    assert not (tmp_path / FILE).exists()


def test_images_in_no_batch_are_left_out_and_the_fraction_says_so(tmp_path, caplog):
    with caplog.at_level(logging.WARNING, "cp_plugin"):
        craft(tmp_path, batches=DataLoader(data(), 10, drop_last=True))
    poison = Poison.load(tmp_path / FILE)
    assert len(poison.keys) == 20
    assert poison.fraction == pytest.approx(20 / 24)
    assert "4 images were in no batch" in caplog.text


def test_rows_in_no_noise_phase_are_counted(tmp_path, caplog):
    batches = DataLoader(data(), 8)
    with caplog.at_level(logging.WARNING, "cp_plugin"):
        craft(tmp_path, batches=batches, rounds=1, model_steps=3, noise_steps=2)
    poison = Poison.load(tmp_path / FILE)
    assert json.loads(poison.info["schedule"])["rows_not_moved"] == 8
    assert "8 of 24 rows were in no noise phase" in caplog.text


def test_a_file_tells_the_steps_of_every_surrogate_that_it_has_been_through(tmp_path):
    first, second = tmp_path / "first", tmp_path / "second"
    craft(first, model_steps=3, noise_steps=1)
    craft(second, model_steps=2, noise_steps=3, pgd_steps=2, init=str(first / FILE))
    assert json.loads(Poison.load(second / FILE).info["parts"]) == [
        {"method": "SimCLR", "model_steps": 6, "noise_steps": 2},
        {"method": "SimCLR", "model_steps": 4, "noise_steps": 12},
    ]


def test_a_loop_that_ends_before_its_noise_phase_saves_nothing(tmp_path):
    module = simclr(lightning.pytorch)
    poison = PoisonLoop(loader(data(), 8), module, rounds=1, model_steps=4, dir=str(tmp_path))
    for batch in poison:
        poison.backward(module.training_step(batch, 0))
    with pytest.raises(UserError, match="ended after 3 model steps, before the first noise phase"):
        poison.save()
    assert not (tmp_path / FILE).exists()


@pytest.mark.parametrize("in_model_phase", [False, True])
def test_a_loop_stops_at_a_loss_that_is_not_finite(in_model_phase, tmp_path):
    module = simclr(lightning.pytorch)
    poison = PoisonLoop(loader(data(), 8), module, rounds=1, model_steps=1, dir=str(tmp_path))

    def run():
        for batch in poison:
            loss = module.training_step(batch, 0)
            spoilt = poison.model_phase == in_model_phase
            poison.backward(loss * float("nan") if spoilt else loss)

    with pytest.raises(UserError, match="nan"):
        run()
    with pytest.raises(UserError):
        poison.save()


def test_a_resumed_craft_knows_which_rows_have_moved(tmp_path):
    poison = craft(tmp_path, rounds=4, more={"max_epochs": 1})
    assert bool(poison.attack.perturbation.moved.all())
    assert torch.equal(poison.crafting.tensors()["moved"], poison.attack.perturbation.moved)
