"""Every form of data loader, batch hook, precision and loop that a host may bring."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from timm.data.loader import MultiEpochsDataLoader
from torch.utils.data import BatchSampler, DataLoader, RandomSampler, WeightedRandomSampler
from torchvision import transforms

from cp_plugin import CraftPoison, InjectPoison, KNNMonitor, Poison, PoisonLoop
from cp_plugin.attack.perturbation import Perturbation
from cp_plugin.callbacks import CraftErrorMin, CraftTap, MirrorViews
from cp_plugin.config.settings import UserError
from tests.support.small_runs import (
    TWO_COPIES,
    TWO_CROPS,
    ClosedLoader,
    EagerLoader,
    LazyLoader,
    Pictures,
    Small,
    Supervised,
    Wrapper,
    fit,
)

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*does not have many workers.*"),
    pytest.mark.filterwarnings("ignore:.*`isinstance.treespec, LeafSpec.*"),
    pytest.mark.filterwarnings("ignore:.*returned `None`.*"),
    pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty"),
]
CRAFT = {"rounds": 2, "model_steps": 2, "noise_steps": 2, "pgd_steps": 1, "seed": 3}
EPS = 8 / 255


def class_poison() -> Poison:
    delta = torch.full((2, 3, 16, 16), EPS)
    return Poison(Perturbation(delta, EPS), "class", None, Pictures.classes)


def change(module: Small, data: Pictures) -> float:
    """Return the largest change of a training view from the clean image nearest to it."""
    views = torch.cat([batch[0][0] for batch in module.batches])
    distances = (views[:, None] - data.clean()[None]).abs().amax((2, 3, 4))
    return float(distances.amin(1).max())


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("kind", [DataLoader, MultiEpochsDataLoader, EagerLoader, LazyLoader])
def test_a_victim_is_poisoned_and_the_run_after_it_is_clean(
    kind: type[Any], workers: int, tmp_path: Path
) -> None:
    if workers and kind not in (DataLoader, EagerLoader):
        pytest.skip("the same with fewer workers")
    data = Pictures(TWO_COPIES)
    loader = kind(data, batch_size=8, num_workers=workers, persistent_workers=workers > 0)
    victim, after = Small(), Small()
    fit(victim, loader, tmp_path, InjectPoison(class_poison()), max_epochs=2)
    assert len(victim.batches) == 4
    assert change(victim, data) == pytest.approx(EPS, abs=1e-6)
    fit(after, loader, tmp_path)
    assert change(after, data) == 0


def test_a_loader_that_hides_its_iterator_is_refused(tmp_path: Path) -> None:
    loader = ClosedLoader(Pictures(TWO_COPIES), batch_size=8)
    says = r"ClosedLoader brings batches of the data set that it was made with, .* for this run"
    with pytest.raises(UserError, match=says):
        fit(Small(), loader, tmp_path, InjectPoison(class_poison()))
    with pytest.raises(UserError, match=says):
        fit(Small(), loader, tmp_path, CraftPoison(**CRAFT))
    after = Small()
    fit(after, loader, tmp_path)
    assert change(after, loader.dataset) == 0


def loaders(data: Pictures) -> dict[str, DataLoader[Any]]:
    weights = torch.arange(len(data), dtype=torch.float64)
    return {
        "batch sampler": DataLoader(
            data, batch_sampler=BatchSampler(RandomSampler(data), 4, drop_last=False)
        ),
        "batch size 1": DataLoader(data, batch_size=1, shuffle=True),
        "weighted": DataLoader(data, 4, sampler=WeightedRandomSampler(weights, 12)),
        "eager": EagerLoader(data, batch_size=4, shuffle=True),
        "lazy": LazyLoader(data, batch_size=4, shuffle=True),
    }


FORMS = ("batch sampler", "batch size 1", "weighted", "eager", "lazy")


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("attack", ["sample", "class", "error_min", "tap", "loop"])
def test_every_attack_takes_every_loader(attack: str, form: str, tmp_path: Path) -> None:
    data = Pictures(TWO_CROPS, 12)
    loader = loaders(data)[form]
    folder = {"dir": str(tmp_path), "dtype": "float32", "init": "zero", **CRAFT}
    if attack == "loop":
        model = Small()
        poison = PoisonLoop(loader, model, **folder)
        for _ in range(4):
            for batch in poison:
                poison.backward(model.training_step(batch, 0))
        assert poison.finished
        poison.save(tmp_path / "poison.safetensors")
    elif attack in ("sample", "class"):
        fit(Small(), loader, tmp_path, CraftPoison(granularity=attack, **folder), max_epochs=4)
    elif attack == "error_min":
        fit(Supervised(), loader, tmp_path, CraftErrorMin(**folder), max_epochs=4)
    else:
        fit(Supervised(), loader, tmp_path, CraftTap(dir=str(tmp_path), pgd_steps=2))
    poison = Poison.load(tmp_path / "poison.safetensors")
    found = poison.perturbation.stored
    if attack == "class":
        assert len(found) == 2
    else:  # images that no batch has brought have no row, and the fraction says so
        assert len(found) == round(12 * poison.fraction) > 4
    if form in ("batch sampler", "eager", "lazy"):
        assert poison.fraction == 1
    moved = found.float().abs().amax((1, 2, 3)) > 0
    assert moved.any()
    if attack == "tap":
        assert moved.all()


def test_a_loader_without_batches_is_refused(tmp_path: Path) -> None:
    loader = DataLoader(Pictures(TWO_CROPS), batch_size=None)
    with pytest.raises(UserError, match=r"batch_size=None and no batch_sampler.*give the loader"):
        fit(Small(), loader, tmp_path, CraftPoison(**CRAFT))
    with pytest.raises(UserError, match=r"batch_size=None and no batch_sampler.*give the loader"):
        PoisonLoop(loader, Small())


class Normalising(pl.LightningDataModule):
    """Normalises on the device, and counts what it moves."""

    def __init__(self) -> None:
        super().__init__()
        self.data = Pictures(TWO_CROPS)

    def train_dataloader(self) -> Any:
        return DataLoader(self.data, 8)

    def on_before_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        views, target = batch
        return [view + 5 for view in views], target

    def transfer_batch_to_device(self, batch: Any, device: Any, dataloader_idx: int) -> Any:
        views, target = batch
        return [(view - 5.5).to(device) for view in views], target.to(device)

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        views, target = batch
        return [view / 0.5 for view in views], target


@pytest.mark.filterwarnings("ignore:.*overridden.*")
def test_hooks_of_a_datamodule_are_passed_once(tmp_path: Path) -> None:
    ranges: list[Any] = []  # not the module's own, which would be put back

    class Watching(Small):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            x0, x1 = batch[0]
            ranges.append((self.training, float(x0.detach().min()), float(x1.detach().max())))
            return super().training_step(batch, batch_idx)

    for callback in (CraftPoison(**CRAFT), MirrorViews()):
        module, data = Watching(), Normalising()
        ranges.clear()
        fit(module, data, tmp_path / type(callback).__name__, callback, max_epochs=2)
        noise = [entry for entry in ranges if not entry[0]]
        assert bool(noise) == isinstance(callback, CraftPoison)
        for _, low, high in ranges:
            assert -1.001 <= low < -0.9
            assert 0.9 < high <= 1.001
        assert "on_after_batch_transfer" not in {**vars(module), **vars(data)}


@pytest.mark.parametrize("precision", ["bf16-true", "16-true", "64-true"])
def test_true_precisions(precision: str, tmp_path: Path) -> None:
    types = {"bf16-true": torch.bfloat16, "16-true": torch.float16, "64-true": torch.float64}
    data, folder = Pictures(TWO_CROPS), tmp_path / "craft"
    module, query = Small(), Pictures(transforms.ToTensor())
    craft = CraftPoison(dtype="float32", init="zero", dir=str(folder), **CRAFT)
    monitor = KNNMonitor(query=query)
    callbacks = (craft, monitor)
    fit(module, DataLoader(data, 8), folder, *callbacks, max_epochs=2, precision=precision)
    assert module.batches[0][0][0].dtype == types[precision]
    found = Poison.load(folder / "poison.safetensors").perturbation.stored
    assert 0 < found.abs().max() <= EPS
    assert len(monitor.results) == 1
    mirrored = Small()
    fit(mirrored, DataLoader(data, 8), tmp_path, MirrorViews(), precision=precision)
    assert mirrored.batches[0][0][0].dtype == types[precision]


def test_a_step_may_leave_a_batch_out(tmp_path: Path) -> None:
    class Skipping(Small):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            return None if batch_idx % 2 else super().training_step(batch, batch_idx)

    class Never(Small):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            return super().training_step(batch, batch_idx) if self.training else None

    settings = {**CRAFT, "init": "zero", "dtype": "float32"}
    craft = CraftPoison(dir=str(tmp_path), **settings)
    fit(Skipping(), DataLoader(Pictures(TWO_CROPS), 4), tmp_path, craft, max_epochs=4)
    assert Poison.load(tmp_path / "poison.safetensors").perturbation.stored.abs().max() > 0
    never = CraftPoison(dir=str(tmp_path / "never"), **settings)
    with pytest.raises(UserError, match=r"no batch of the noise phase .* Never left all of them"):
        fit(Never(), DataLoader(Pictures(TWO_CROPS), 4), tmp_path, never, max_epochs=4)


def test_a_fast_dev_run_leaves_no_poison(tmp_path: Path) -> None:
    loader = DataLoader(Pictures(TWO_CROPS), 8)
    tried = CraftPoison(rounds=2, pgd_steps=1, dir=str(tmp_path))
    fit(Small(), loader, tmp_path, tried, fast_dev_run=True)
    assert tried.schedule.model_steps == 1
    assert not list(tmp_path.rglob("*.safetensors"))
    fit(Small(), loader, tmp_path, CraftPoison(rounds=2, pgd_steps=1, dir=str(tmp_path)),
        max_epochs=2)  # fmt: skip
    assert (tmp_path / "poison.safetensors").exists()
    fit(Small(), loader, tmp_path, CraftPoison(rounds=2, dir=str(tmp_path)), fast_dev_run=True)


def test_every_checkpoint_that_is_kept_can_be_resumed(tmp_path: Path) -> None:
    def craft(path: str | None = None, kept: int = -1, folder: Path = tmp_path) -> Poison:
        torch.manual_seed(0)
        keep = pl.callbacks.ModelCheckpoint(folder, save_top_k=kept, filename="{epoch}")
        trainer = pl.Trainer(
            **{"accelerator": "cpu", "devices": 1, "max_epochs": 5, "logger": False},
            **{"enable_progress_bar": False, "enable_model_summary": False},
            callbacks=[CraftPoison(rounds=5, pgd_steps=1, seed=3, dir=str(folder)), keep],
            default_root_dir=folder,
        )
        trainer.fit(Small(), DataLoader(Pictures(TWO_CROPS), 8), ckpt_path=path)
        found = Poison.load(folder / "poison.safetensors")
        (folder / "poison.safetensors").unlink()
        return found

    whole = craft()
    assert len(list(tmp_path.glob("delta-step=*"))) == 5
    for number in (1, 3):
        resumed = craft(str(tmp_path / f"epoch={number}.ckpt"))
        assert torch.equal(resumed.perturbation.stored, whole.perturbation.stored)
    craft(kept=1, folder=tmp_path / "one")
    assert len(list((tmp_path / "one").glob("*.ckpt"))) == 1
    assert len(list((tmp_path / "one").glob("delta-step=*"))) == 2


def test_several_validation_loaders(tmp_path: Path) -> None:
    class Validating(Small):
        def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
            """Do nothing."""

    query = DataLoader(Pictures(transforms.ToTensor()), 8)

    def results(validation: Any) -> int:
        monitor = KNNMonitor()
        trainer = pl.Trainer(
            **{"accelerator": "cpu", "devices": 1, "max_epochs": 1, "logger": False},
            **{"enable_progress_bar": False, "enable_model_summary": False},
            callbacks=[monitor], default_root_dir=tmp_path, enable_checkpointing=False,
        )  # fmt: skip
        trainer.fit(Validating(), DataLoader(Pictures(TWO_CROPS), 8), validation)
        return len(monitor.results)

    assert results([query]) == 1
    with pytest.raises(UserError, match=r"one validation loader and found 2; pass .*query="):
        results({"one": query, "other": query})


@pytest.mark.parametrize("how", ["accelerate", "fabric", "wrapper"])
def test_loaders_and_backward_passes_of_other_loops(how: str) -> None:
    model, loader = Small(), DataLoader(Pictures(TWO_CROPS), 8)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    wrapped: Any = Wrapper(loader)
    backward = None
    if how == "accelerate":
        accelerate = pytest.importorskip("accelerate")
        framework = accelerate.Accelerator(cpu=True)
        model, optimizer, wrapped = framework.prepare(model, optimizer, loader)
        backward = framework.backward
    elif how == "fabric":
        from lightning.fabric import Fabric

        framework = Fabric(accelerator="cpu", devices=1, precision="bf16-mixed")
        backward = framework.backward
        wrapped = framework.setup_dataloaders(loader)
    network: Any = model
    if how == "fabric":
        network, optimizer = framework.setup(torch.nn.Sequential(model.backbone, model.head),
                                             optimizer)  # fmt: skip
    poison = PoisonLoop(wrapped, network, init="zero", dtype="float32", **CRAFT)
    for _ in range(4):
        for views, _ in poison:
            if how == "fabric":
                loss = (network(views[0]) - network(views[1])).square().mean()
            else:
                loss = model.training_step((views, None), 0)
            poison.backward(loss, backward=backward)
            optimizer.step()
            optimizer.zero_grad()
    assert poison.finished
    assert len(poison.losses) == 2
    assert poison.poison().perturbation.stored.abs().max() > 0


def test_one_view_is_refused_by_what_is_missing(tmp_path: Path) -> None:
    def two_views(samples: Any) -> Any:
        images = torch.stack([image for image, _ in samples])
        return [images, images.flip(-1)], torch.tensor([target for _, target in samples])

    loader = DataLoader(Pictures(transforms.ToTensor()), 8, collate_fn=two_views)
    unseen = r"collate_fn of the data loader fails .* let `self.transform` make the views"
    with pytest.raises(UserError, match=unseen):
        next(iter(PoisonLoop(loader, Small())))
    with pytest.raises(UserError, match=unseen):
        fit(Small(), loader, tmp_path, CraftPoison(**CRAFT))
    alone = r"one view of an image, and Small\.training_step fails .* MultiViewTransform"
    with pytest.raises(UserError, match=alone):
        fit(Small(), DataLoader(Pictures(transforms.ToTensor()), 8), tmp_path, CraftPoison(**CRAFT))


def test_a_transform_that_is_called_for_each_view_is_served(tmp_path: Path) -> None:
    class Pair(Pictures):
        def __getitem__(self, row: int) -> Any:
            first, target = super().__getitem__(row)
            return first, super().__getitem__(row)[0], target

    class Three(Small):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            first, second, target = batch
            return super().training_step(((first, second), target), batch_idx)

    module = Three()
    craft = CraftPoison(dir=str(tmp_path), **CRAFT)
    fit(module, DataLoader(Pair(CROPS_ALONE), 8), tmp_path, craft, max_epochs=2)
    first, second = module.batches[0][0]
    assert not torch.equal(first, second)
    assert Poison.load(tmp_path / "poison.safetensors").perturbation.stored.abs().max() > 0


CROPS_ALONE = transforms.Compose(
    [transforms.RandomResizedCrop(16, scale=(0.5, 1)), transforms.ToTensor()]
)
