"""Crafting, injecting and monitoring inside Lightning trainers of both roots."""

import csv
import json

import lightning.pytorch
import pytest
import torch
from lightly.transforms.simclr_transform import SimCLRTransform
from torch.utils.data import DataLoader

from cp_plugin import CraftPoison, InjectPoison, KNNMonitor, Poison
from cp_plugin.attack.perturbation import Perturbation
from cp_plugin.callbacks import MirrorViews
from cp_plugin.callbacks.monitor import Journal
from cp_plugin.config.settings import UserError
from cp_plugin.data import Photos, RawDataset
from cp_plugin.util.run_files import KNN_FILE
from tests.support.own_module import ROOTS, loader, simclr, trainer

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*does not have many workers.*"),
    pytest.mark.filterwarnings("ignore:.*logging interval.*"),
    pytest.mark.filterwarnings("ignore:.*`isinstance.treespec, LeafSpec.*"),
]


@pytest.fixture
def data():
    return Photos(train=True, patches=4, transform=SimCLRTransform(input_size=32, gaussian_blur=0))


@pytest.mark.parametrize("root", ROOTS.values(), ids=ROOTS)
@pytest.mark.parametrize("granularity", ["class", "sample"])
def test_crafting_inside_a_users_module(root, granularity, data, tmp_path):
    craft = CraftPoison(
        granularity=granularity, rounds=3, model_steps=2, noise_steps=1, pgd_steps=2
    )
    module = simclr(root)
    fitting = trainer(root, tmp_path, craft, max_epochs=5)
    fitting.fit(module, loader(data))
    assert fitting.global_step == 6
    poison = Poison.load(tmp_path / "poison.safetensors")
    assert poison.granularity == granularity
    assert len(poison.perturbation) == (12 if granularity == "class" else 48)
    assert poison.info["method"] == "SimCLR"
    # The module saw nothing but its own batches, and data and loader are as they were.
    assert all(view.shape == (12, 3, 32, 32) for view, _ in module.seen)
    assert isinstance(data.transform, SimCLRTransform)
    assert "on_after_batch_transfer" not in vars(module)
    raw = RawDataset(data, 32)
    rows = poison.rows([raw[row].key for row in range(48)], ["?"] * 48)
    assert granularity == "class" or (rows >= 0).all()


@pytest.mark.parametrize("root", ROOTS.values(), ids=ROOTS)
def test_a_joint_schedule_moves_delta_with_every_step_of_the_module(root, data, tmp_path):
    settings = {"init": "zero", "dtype": "float32", "step_size": 0.1}
    craft = CraftPoison(schedule="joint", rounds=2, model_steps=4, **settings)
    module = simclr(root)
    fitting = trainer(root, tmp_path, craft, max_epochs=9)
    fitting.fit(module, loader(data))
    assert fitting.global_step == len(module.seen) == 8
    poison = Poison.load(tmp_path / "poison.safetensors")
    schedule = json.loads(poison.info["schedule"])
    assert schedule["joint"] is True
    assert schedule["surrogate_steps_done"] == schedule["rounds"] * schedule["model_steps"] == 8
    assert schedule["noise_steps"] == 0
    # Each image was in two batches, so its row has moved by at most two steps.
    steps = poison.perturbation.stored / (0.1 * 8 / 255)
    assert len(steps) == 48
    assert torch.allclose(steps, steps.round(), atol=1e-4)
    assert (steps.abs().amax((1, 2, 3)).round() == 2).all()


def test_a_joint_schedule_needs_a_gradient_to_the_views(data, tmp_path):
    module = simclr(lightning.pytorch)
    own_step = module.training_step

    def later_cut(batch, batch_idx):
        # Not while the module is settled on its first batch, in eval mode.
        views = [view.detach() for view in batch[0]] if module.training else batch[0]
        return own_step([views, batch[1]], batch_idx)

    module.training_step = later_cut
    craft = CraftPoison(schedule="joint", rounds=2, model_steps=2)
    with pytest.raises(UserError, match="found no gradient from the loss to the views: SimCLR"):
        trainer(lightning.pytorch, tmp_path, craft).fit(module, loader(data))
    assert not (tmp_path / "poison.safetensors").exists()


def test_labels_stay_with_their_images(data, tmp_path):
    module = simclr(lightning.pytorch)
    craft = CraftPoison(granularity="class", rounds=1, model_steps=4, noise_steps=1)
    fitting = trainer(lightning.pytorch, tmp_path, craft)
    fitting.fit(module, loader(data))
    targets = torch.cat([target for _, target in module.seen[:4]])
    assert sorted(targets.tolist()) == sorted(data.targets)


def test_the_callback_of_a_users_loss_stays_unpoisoned_without_the_plugin(data, tmp_path):
    """Exchange and restore: a second fit on the same loader is the user's own training."""
    batches = loader(data)
    craft = CraftPoison(granularity="class", rounds=1, model_steps=2, noise_steps=1)
    trainer(lightning.pytorch, tmp_path, craft).fit(simclr(lightning.pytorch), batches)
    assert batches.dataset is data
    (views, targets) = next(iter(batches))
    assert len(views) == 2
    assert len(targets) == 12


def test_a_poison_is_never_overwritten(data, tmp_path):
    (tmp_path / "poison.safetensors").touch()
    craft = CraftPoison(rounds=1, model_steps=1, noise_steps=1)
    with pytest.raises(UserError, match="never overwritten"):
        trainer(lightning.pytorch, tmp_path, craft).fit(simclr(lightning.pytorch), loader(data))


def test_starting_from_a_class_poison(data, tmp_path):
    levels = torch.linspace(-0.03, 0.03, 12)  # one of its own for each class
    rows = levels.view(12, 1, 1, 1).expand(12, 3, 32, 32).contiguous()
    start = Poison(Perturbation(rows, 8 / 255), "class", classes=data.classes)
    start.save(tmp_path / "start.safetensors")
    craft = CraftPoison(
        rounds=1,
        model_steps=1,
        noise_steps=4,
        step_size=0.01,
        init=str(tmp_path / "start.safetensors"),
    )
    trainer(lightning.pytorch, tmp_path, craft).fit(simclr(lightning.pytorch), loader(data))
    poison = Poison.load(tmp_path / "poison.safetensors")
    raw = RawDataset(data, 32)
    found = poison.rows([raw[row].key for row in range(48)])
    assert sorted(found.tolist()) == list(range(48))
    expected = levels[torch.tensor(data.targets)].view(48, 1, 1, 1)
    moved = 6 * 0.01 * 8 / 255
    assert moved < levels.diff().min() / 2  # so that no class is taken for another
    assert (poison.perturbation.gather(found) - expected).abs().max() < moved


def test_a_part_of_each_class_is_poisoned(data, tmp_path):
    craft = CraftPoison(rounds=1, model_steps=1, noise_steps=4, fraction=0.5)
    trainer(lightning.pytorch, tmp_path, craft).fit(simclr(lightning.pytorch), loader(data))
    poison = Poison.load(tmp_path / "poison.safetensors")
    raw = RawDataset(data, 32)
    rows = poison.rows([raw[row].key for row in range(48)])
    found = torch.bincount(torch.tensor(data.targets)[rows >= 0], minlength=12)
    assert found.tolist() == [2] * 12


@pytest.mark.parametrize("root", ROOTS.values(), ids=ROOTS)
def test_a_victim_sees_poisoned_images_and_its_own_transform(root, data, tmp_path):
    data.transform = None
    from torchvision.transforms import PILToTensor

    class Twice:
        def __call__(self, image):
            return [PILToTensor()(image).float()] * 2

    data.transform = Twice()
    delta = torch.linspace(-8, 8, 12).round().view(12, 1, 1, 1).expand(12, 3, 32, 32) / 255
    poison = Poison(Perturbation(delta.contiguous(), 8 / 255), "class", classes=data.classes)
    module = simclr(root)
    fitting = trainer(root, tmp_path, InjectPoison(poison), max_epochs=1)
    fitting.fit(module, DataLoader(data, batch_size=48))
    view, targets = module.seen[0]
    clean = torch.from_numpy(data.data).permute(0, 3, 1, 2)
    assert torch.equal(view.to(torch.uint8), poison.apply(clean, targets))


def test_mirrored_views_of_a_victim_are_poisoned(data, tmp_path):
    delta = torch.full((12, 3, 32, 32), 8 / 255)
    poison = Poison(Perturbation(delta, 8 / 255), "class", classes=data.classes)
    means = {}
    for name, callbacks in {"clean": [], "poisoned": [InjectPoison(poison)]}.items():
        module = simclr(lightning.pytorch)
        lightning.pytorch.seed_everything(3, verbose=False)
        fitting = trainer(lightning.pytorch, tmp_path, *callbacks, MirrorViews(), max_epochs=1)
        fitting.fit(module, DataLoader(data, batch_size=48))
        means[name] = module.seen[0][0].mean()
    assert 0.5 < (means["poisoned"] - means["clean"]) / (8 / 255 / 0.226) < 1.2


def test_each_seed_draws_its_own_mirrored_views(data, tmp_path):
    def views(seed):
        lightning.pytorch.seed_everything(seed, verbose=False)
        module = simclr(lightning.pytorch)
        fitting = trainer(lightning.pytorch, tmp_path, MirrorViews(), max_epochs=1)
        fitting.fit(module, DataLoader(data, batch_size=24))
        return torch.stack([view for view, _ in module.seen])

    first = views(0)
    assert torch.equal(first, views(0))
    assert not torch.equal(first[0], first[1])
    assert not torch.equal(first, views(1))


def test_a_poison_of_other_images_names_those_it_misses(image_folder, tmp_path):
    from torchvision.datasets import ImageFolder

    folder = image_folder()
    transform = SimCLRTransform(input_size=32)
    poison = Poison(
        Perturbation.zeros(2, (3, 32, 32), 8 / 255), "sample", keys=torch.tensor([1, 2])
    )
    with pytest.raises(UserError, match=r"no row for 12 of 12 images looked up \(.*_000\.png"):
        trainer(lightning.pytorch, tmp_path, InjectPoison(poison)).fit(
            simclr(lightning.pytorch), loader(ImageFolder(folder, transform))
        )


def test_class_granularity_needs_labels(image_folder, tmp_path):
    from cp_plugin.data import FlatFolder

    data = FlatFolder(image_folder(flat=True), SimCLRTransform(input_size=32))
    craft = CraftPoison(granularity="class", rounds=1, model_steps=1, noise_steps=1)
    with pytest.raises(UserError, match="needs labelled images"):
        trainer(lightning.pytorch, tmp_path, craft).fit(simclr(lightning.pytorch), loader(data))


def test_losses_reach_the_logger(data, tmp_path):
    logger = lightning.pytorch.loggers.CSVLogger(tmp_path, name="", version="logs")
    craft = CraftPoison(granularity="class", rounds=2, model_steps=2, noise_steps=1)
    monitor = KNNMonitor(query=Photos(train=False, patches=4), every_n_epochs=1, k=3)
    fitting = trainer(
        lightning.pytorch, tmp_path, craft, monitor, logger=logger, log_every_n_steps=1
    )
    fitting.fit(simclr(lightning.pytorch), loader(data))
    with (tmp_path / "logs" / "metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    for name in ("cp_model_loss", "cp_noise_loss", "knn_clean_bank", "knn_poisoned_bank"):
        values = [float(row[name]) for row in rows if row.get(name)]
        assert values, name
        assert all(value == value for value in values)
    assert monitor.results[-1]["k"] == 3
    assert 0 <= monitor.results[-1]["knn_poisoned_bank"] <= 100


def test_the_noise_phase_itself_logs_nothing(data, tmp_path):
    module = simclr(lightning.pytorch)
    own_step = module.training_step
    calls = []

    def logging_step(batch, batch_idx):
        calls.append(module.training)
        loss = own_step(batch, batch_idx)
        module.log("own_loss", loss, on_step=True)
        return loss

    module.training_step = logging_step
    logger = lightning.pytorch.loggers.CSVLogger(tmp_path, name="", version="logs")
    craft = CraftPoison(granularity="class", rounds=2, model_steps=2, noise_steps=5)
    fitting = trainer(lightning.pytorch, tmp_path, craft, logger=logger, log_every_n_steps=1)
    fitting.fit(module, loader(data))
    with (tmp_path / "logs" / "metrics.csv").open() as file:
        logged = [row for row in csv.DictReader(file) if row["own_loss"]]
    assert len(logged) == 4
    # The first batch is looked at in eval mode: once for the branches, twice for the labels. Then
    # two rounds of 2 training steps and 5 batches of the noise phase, T = 5, in eval mode; before
    # the last one the labels are looked at again.
    assert calls == 3 * [False] + 2 * [True] + 25 * [False] + 2 * [True] + 27 * [False]
    assert len(module.seen) == 4  # what the noise phase left in the module is gone


def test_a_resumed_craft_goes_on_where_it_was(data, tmp_path):
    def craft():
        return CraftPoison(granularity="sample", rounds=4, model_steps=2, noise_steps=2)

    first = craft()
    fitting = trainer(lightning.pytorch, tmp_path, first, max_epochs=1)
    fitting.fit(simclr(lightning.pytorch), loader(data))
    (tmp_path / "poison.safetensors").unlink()
    fitting.save_checkpoint(tmp_path / "last.ckpt")
    assert len(list(tmp_path.glob("delta-step=*.safetensors"))) == 1
    second = craft()
    again = trainer(lightning.pytorch, tmp_path, second, max_epochs=10)
    again.fit(simclr(lightning.pytorch), loader(data), ckpt_path=tmp_path / "last.ckpt")
    assert second.schedule.steps_done == again.global_step == 8
    assert (tmp_path / "poison.safetensors").exists()
    checkpoint = torch.load(tmp_path / "last.ckpt", weights_only=True)
    assert "delta" not in str(checkpoint["state_dict"].keys())


def test_a_poison_is_handed_on_to_surrogates_that_begin_anew(data, tmp_path):
    weights, optimizers, rates = [], [], []

    class Watch(lightning.pytorch.Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            weights.append(torch.cat([p.detach().flatten() for p in pl_module.parameters()]))
            optimizers.append(trainer.optimizers[0])
            rates.append(trainer.optimizers[0].param_groups[0]["lr"])

    class Scheduled(type(simclr(lightning.pytorch))):
        def configure_optimizers(self):
            optimizer = torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9)
            steps = self.trainer.estimated_stepping_batches
            schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, steps)
            return {
                "optimizer": optimizer,
                "lr_scheduler": {"scheduler": schedule, "interval": "step"},
            }

    class Stop(lightning.pytorch.Callback):
        def on_train_epoch_end(self, trainer, pl_module):
            if trainer.global_step == 8:
                trainer.save_checkpoint(tmp_path / "last.ckpt")
                raise KeyboardInterrupt

    def fit(*callbacks, **kwargs):
        craft = CraftPoison(
            granularity="class", rounds=2, model_steps=3, noise_steps=1, restarts=2, dir=tmp_path
        )
        module = simclr(lightning.pytorch)
        module.__class__ = Scheduled
        every = [craft, Watch(), *callbacks]
        fitting = trainer(lightning.pytorch, tmp_path, *every, max_epochs=9)
        fitting.fit(module, loader(data), **kwargs)
        return fitting

    fitting = fit()
    assert fitting.global_step == len(weights) == 18
    for start in (6, 12):
        assert torch.equal(weights[start], weights[0])
        assert not torch.equal(weights[start - 1], weights[0])
        assert rates[start : start + 6] == rates[:6]
    assert len({id(one) for one in optimizers}) == 3
    poison = Poison.load(tmp_path / "poison.safetensors")
    schedule = json.loads(poison.info["schedule"])
    assert (schedule["surrogates"], schedule["surrogate_steps_done"]) == (3, 18)

    # A run that is resumed past the end of the first surrogate goes on, and begins the third one
    # with the weights that the first one began with.
    (tmp_path / "poison.safetensors").unlink()
    weights.clear(), rates.clear()
    with pytest.raises(SystemExit):
        fit(Stop())
    started = weights[0]
    weights.clear(), rates.clear()
    assert fit(ckpt_path=tmp_path / "last.ckpt").global_step == 18
    assert len(weights) == 10
    assert torch.equal(weights[4], started)
    assert rates[4:] == pytest.approx([0.1 * (6 - step) / 6 for step in range(6)])
    assert (tmp_path / "poison.safetensors").exists()


def test_a_resumed_run_has_the_whole_curve(data, tmp_path):
    def fit(epochs, **kwargs):
        monitor = KNNMonitor(query=Photos(train=False, patches=2), every_n_epochs=1)
        module = simclr(lightning.pytorch)
        callbacks = [monitor, Journal(monitor, tmp_path)]
        fitting = trainer(lightning.pytorch, tmp_path, *callbacks, max_epochs=epochs)
        fitting.fit(module, loader(data), **kwargs)
        return fitting, monitor

    first, before = fit(2)
    first.save_checkpoint(tmp_path / "last.ckpt")
    _, after = fit(3, ckpt_path=tmp_path / "last.ckpt")
    assert [row["epoch"] for row in after.results] == [0, 1, 2]
    assert after.results[:2] == before.results
    assert all(row["loss"] > 0 for row in after.results)
    with (tmp_path / KNN_FILE).open() as file:
        assert [row["epoch"] for row in csv.DictReader(file)] == ["0", "1", "2"]


def test_a_changed_snapshot_is_refused(data, tmp_path):
    first = CraftPoison(rounds=4, model_steps=2, noise_steps=1)
    fitting = trainer(lightning.pytorch, tmp_path, first, max_epochs=1)
    fitting.fit(simclr(lightning.pytorch), loader(data))
    fitting.save_checkpoint(tmp_path / "last.ckpt")
    (tmp_path / "poison.safetensors").unlink()
    (snapshot,) = tmp_path.glob("delta-step=*.safetensors")
    snapshot.write_bytes(snapshot.read_bytes() + b" ")
    again = trainer(
        lightning.pytorch, tmp_path, CraftPoison(rounds=4, model_steps=2, noise_steps=1)
    )
    with pytest.raises(UserError, match="not the snapshot of delta"):
        again.fit(simclr(lightning.pytorch), loader(data), ckpt_path=tmp_path / "last.ckpt")


def test_unlabelled_monitors_are_refused(image_folder, tmp_path):
    from cp_plugin.data import FlatFolder

    data = FlatFolder(image_folder(flat=True), SimCLRTransform(input_size=32))
    monitor = KNNMonitor(query=Photos(train=False, patches=2))
    with pytest.raises(UserError, match="need labelled images"):
        trainer(lightning.pytorch, tmp_path, monitor).fit(simclr(lightning.pytorch), loader(data))
