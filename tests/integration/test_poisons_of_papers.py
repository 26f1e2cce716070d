"""Poisons of other papers, each against a slow computation of its own: one image at a time."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from omegaconf import OmegaConf
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import DataLoader
from torchvision import transforms

from cp_plugin import Poison
from cp_plugin.apps.hydra_app import compose
from cp_plugin.attack.loop import Schedule
from cp_plugin.attack.separability import class_separability
from cp_plugin.callbacks import (
    CraftAap,
    CraftAue,
    CraftPil,
    CraftSep,
    CraftTue,
    CraftUnlearnableClusters,
)
from cp_plugin.config.selection import Selection
from cp_plugin.config.settings import UserError
from cp_plugin.data import RawDataset
from cp_plugin.data.batch import Batch
from cp_plugin.engine.methods import build_method
from cp_plugin.engine.pipeline import build_pipeline
from cp_plugin.engine.settings import complete
from cp_plugin.hosts.supervised import EnsembleHost
from cp_plugin.util.paths import shipped
from tests.support.small_runs import TWO_COPIES, Pictures, Small, Supervised, fit

EPS = 8 / 255
COUNT = 16
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*does not have many workers.*"),
    pytest.mark.filterwarnings("ignore:.*logging interval.*"),
    pytest.mark.filterwarnings("ignore:.*`isinstance.treespec, LeafSpec.*"),
]


def settings_of(name: str) -> Any:
    """The settings of a group file."""
    node: Any = OmegaConf.load(shipped("configs") / "poison" / f"{name}.yaml")
    return Selection.of(OmegaConf.to_container(node.poison), None).poison  # type: ignore[arg-type]


def crafted(folder: Path, module: Any, craft: Any, epochs: int) -> Tensor:
    """Craft on all images at once, in order and without augmentation; delta by image."""
    data = Pictures(transforms.ToTensor(), COUNT)
    fit(module, DataLoader(data, batch_size=COUNT), folder, craft, max_epochs=epochs)
    poison = Poison.load(folder / "poison.safetensors")
    raw = RawDataset(data, None)
    rows = poison.rows([raw[row].key for row in range(COUNT)])
    return poison.perturbation.gather(torch.as_tensor(rows))


def logits(module: Any, image_CHW: Tensor) -> Tensor:
    return module.head(module.backbone(image_CHW[None]))[0]


def slow_cross_entropy(module: Any, image_CHW: Tensor, label: int) -> Tensor:
    scores = logits(module, image_CHW)
    return torch.logsumexp(scores, 0) - scores[label]


def slow_step(delta: Tensor, gradient: Tensor, step: float) -> Tensor:
    """Pixel by pixel: a step against the sign, then back into the budget."""
    moved = [d - step * ((g > 0) - (g < 0)) for d, g in zip(delta.flatten().tolist(),
             gradient.flatten().tolist(), strict=True)]  # fmt: skip
    return torch.tensor([min(EPS, max(-EPS, d)) for d in moved]).view_as(delta)


def slow_trained(module: Any, images: list[Tensor], labels: list[int]) -> None:
    """One step of gradient descent on the mean loss of the images, without an optimizer."""
    losses = [slow_cross_entropy(module, x, y) for x, y in zip(images, labels, strict=True)]
    weights = list(module.parameters())
    gradients = torch.autograd.grad(sum(losses) / len(losses), weights)  # type: ignore[arg-type]
    with torch.no_grad():
        for weight, gradient in zip(weights, gradients, strict=True):
            weight -= 0.05 * gradient


def slow_noise(
    module: Any, clean: Tensor, delta: list[Tensor], labels: list[int], steps: int, step: float
) -> None:
    """Move each delta by itself so that the label's cross-entropy falls."""
    for row, label in enumerate(labels):
        for _ in range(steps):
            leaf = delta[row].clone().requires_grad_()
            loss = slow_cross_entropy(module, (clean[row] + leaf).clamp(0, 1), label)
            delta[row] = slow_step(delta[row], torch.autograd.grad(loss, leaf)[0], step)


def agreeing(found: Tensor, expected: Tensor) -> float:
    """Part of the pixels that agree; where a gradient is next to 0 its sign may differ."""
    return float(((found - expected).abs() < 1e-6).float().mean())


def slow_aue(module: Any, rounds: int, steps: int, step: float) -> Tensor:
    data = Pictures(None, COUNT)
    clean, labels = data.clean(), data.targets
    delta = [torch.zeros(3, 16, 16) for _ in range(COUNT)]
    for _ in range(rounds):
        now = [(x + d).clamp(0, 1) for x, d in zip(clean, delta, strict=True)]
        slow_trained(module, now, labels)
        slow_noise(module, clean, delta, labels, steps, step)
    return torch.stack(delta)


def test_aue_is_the_papers_alternation_computed_an_image_at_a_time(tmp_path: Path) -> None:
    """Whole epochs of the surrogate, then of noise; T steps of 0.1 eps down the cross-entropy."""
    settings: dict[str, Any] = {"rounds": 2, "init": "zero", "dtype": "float32"}
    module = Supervised()
    expected = slow_aue(copy.deepcopy(module), rounds=2, steps=5, step=0.1 * EPS)
    found = crafted(tmp_path, module, CraftAue(**settings, dir=str(tmp_path)), epochs=9)
    assert agreeing(found, expected) > 0.999
    assert found.abs().max() == pytest.approx(EPS)
    assert Poison.load(tmp_path / "poison.safetensors").info["poison"] == "aue"
    other = slow_aue(Supervised(), rounds=2, steps=4, step=0.1 * EPS)
    assert agreeing(found, other) < 0.9


def slow_aap(module: Any, epochs: int, steps: int, step: float, away: bool) -> Tensor:
    data = Pictures(None, COUNT)
    clean, labels = data.clean(), data.targets
    for _ in range(epochs):
        slow_trained(module, list(clean), labels)
    delta = [torch.zeros(3, 16, 16) for _ in range(COUNT)]
    if away:  # up the loss of the own class is down its negative
        for row, label in enumerate(labels):
            for _ in range(steps):
                leaf = delta[row].clone().requires_grad_()
                loss = -slow_cross_entropy(module, (clean[row] + leaf).clamp(0, 1), label)
                delta[row] = slow_step(delta[row], torch.autograd.grad(loss, leaf)[0], step)
    else:
        targets = [(label + 1) % 2 for label in labels]
        slow_noise(module, clean, delta, targets, steps, step)
    return torch.stack(delta)


class TwoClasses(Supervised):
    """A classifier with as many outputs as there are classes, where the next one wraps around."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(4 * 7 * 7, 2)

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return functional.cross_entropy(self.head(self.backbone(batch[0])), batch[1])


@pytest.mark.parametrize("targeted", [True, False])
def test_aap_is_the_papers_attack_on_a_surrogate_trained_on_clean_images(
    targeted: bool, tmp_path: Path
) -> None:
    settings: dict[str, Any] = {"pgd_steps": 30, "dtype": "float32", "targeted": targeted}
    module = TwoClasses()
    expected = slow_aap(copy.deepcopy(module), 4, 30, 0.01 * EPS, away=not targeted)
    found = crafted(tmp_path, module, CraftAap(**settings, dir=str(tmp_path)), epochs=4)
    assert agreeing(found, expected) > 0.999
    assert found.abs().max() == pytest.approx(0.3 * EPS)  # 30 steps of a hundredth
    assert Poison.load(tmp_path / "poison.safetensors").info["poison"] == "aap"


def test_aue_and_aap_cost_what_the_paper_says() -> None:
    """CIFAR-10: 18 million passes of images for AUE, 14.5 million for AAP."""
    aue, aap = settings_of("aue"), settings_of("aap")
    assert (aue.model_steps, aue.noise_steps) == ("epoch", "epoch")
    passes = Schedule(aue.rounds, 1, 1, aue.pgd_steps).image_passes(50_000, 1)
    assert passes == 18_000_000
    epochs = compose("supervised", ["+poison=aap"]).max_epochs
    assert Schedule(1, epochs, 1, aap.pgd_steps).image_passes(50_000, 1) == 14_500_000


@pytest.mark.parametrize(("name", "strength"), [("aue", 0.6), ("aap", 0.4), ("aap", 0.0)])
def test_a_strength_weakens_crops_jitter_and_grey(name: str, strength: float) -> None:
    """Against the formulas: crops from 1 - 0.9 s, jitter .4 .4 .4 .1 and .8, grey .2, times s."""
    chosen = [] if strength else ["augmentations.0.strength=0"]
    cfg = complete(compose("supervised", [f"+poison={name}", *chosen]))
    (view,) = build_pipeline(cfg).transforms
    made = {type(step).__name__: step for step in view.transforms}
    assert made["RandomResizedCrop"].scale == pytest.approx((1 - 0.9 * strength, 1))
    assert made["RandomHorizontalFlip"].p == 0.5
    if strength == 0:
        assert {"RandomApply", "RandomGrayscale"}.isdisjoint(made)
        return
    assert made["RandomGrayscale"].p == pytest.approx(0.2 * strength)
    assert made["RandomApply"].p == pytest.approx(0.8 * strength)
    (jitter,) = made["RandomApply"].transforms
    for found in (jitter.brightness, jitter.contrast, jitter.saturation):
        assert found == pytest.approx((1 - 0.4 * strength, 1 + 0.4 * strength))
    assert jitter.hue == pytest.approx((-0.1 * strength, 0.1 * strength))


def slow_discriminant(delta: list[Tensor], labels: list[int]) -> Tensor:
    """Section 4.1 of the paper, a pair of classes at a time."""
    classes = sorted({label for label in labels if label >= 0})
    of = {k: [d for d, label in zip(delta, labels, strict=True) if label == k] for k in classes}
    centre = {k: sum(of[k]) / len(of[k]) for k in classes}
    spread = {
        k: sum(((d - centre[k]) ** 2).sum().sqrt() for d in of[k]) / len(of[k])  # type: ignore[misc]
        for k in classes
    }
    total = torch.zeros((), dtype=delta[0].dtype)
    for i in classes:
        pairs = [
            (spread[i] + spread[j]) / ((centre[i] - centre[j]) ** 2).sum().sqrt()
            for j in classes
            if j != i
        ]
        total = total + sum(pairs) / len(pairs)  # type: ignore[arg-type]
    return total / len(classes)


@pytest.mark.parametrize("labels", [[0, 1, 0, 1, 2, 2, 2], [0, 3, -1, 3, 0, 0, 3]])
def test_the_discriminant_is_the_papers_formula(labels: list[int]) -> None:
    draws = torch.Generator().manual_seed(0)
    delta = torch.randn(7, 3, 4, 4, generator=draws, dtype=torch.float64, requires_grad=True)
    found, expected = (
        class_separability(delta, torch.tensor(labels)),
        slow_discriminant(list(delta), labels),
    )
    assert found.item() == pytest.approx(expected.item(), rel=1e-9)
    gradients = [torch.autograd.grad(loss, delta)[0] for loss in (found, expected)]
    assert torch.allclose(*gradients, atol=1e-9)
    assert gradients[0].abs().sum() > 0
    if -1 in labels:
        assert not gradients[0][2].any()


@pytest.mark.parametrize("labels", [[1, 1, 1], [-1, -1, 2], [-1, -1, -1], [0, 1, 2]])
def test_the_discriminant_has_a_finite_gradient_where_nothing_is_spread(labels: list[int]) -> None:
    delta = torch.zeros(3, 3, 2, 2, requires_grad=True)
    value = class_separability(delta, torch.tensor(labels))
    assert value == 0
    assert not torch.autograd.grad(value, delta)[0].any()


def test_tue_descends_the_surrogates_loss_and_the_discriminant(tmp_path: Path) -> None:
    """Two steps on a fixed surrogate; from 0 the first one is down the loss alone."""
    data = Pictures(TWO_COPIES, COUNT)
    loader, module = DataLoader(data, batch_size=COUNT), Small()
    found = {}
    for weight in (1e-9, 50.0):
        steps: dict[str, Any] = {"rounds": 1, "pgd_steps": 2, "init": "zero", "dtype": "float32"}
        folder = tmp_path / str(weight)
        craft = CraftTue(**steps, separability=weight, dir=str(folder))
        module = Small()
        fit(module, loader, folder, craft)
        poison, raw = Poison.load(folder / "poison.safetensors"), RawDataset(data, None)
        rows = poison.rows([raw[row].key for row in range(COUNT)])
        found[weight] = poison.perturbation.gather(torch.as_tensor(rows))
        assert poison.info["poison"] == "tue"
        clean, delta = data.clean(), [torch.zeros(3, 16, 16)] * COUNT
        for _ in range(2):
            leaves = [d.clone().requires_grad_() for d in delta]
            views = torch.stack([(x + d).clamp(0, 1) for x, d in zip(clean, leaves, strict=True)])
            loss = module.training_step(([views, views], None), 0)
            moved = any(bool(d.any()) for d in delta)
            term = weight * slow_discriminant(leaves, data.targets) if moved else 0
            gradients = torch.autograd.grad(loss + term, leaves)
            delta = [slow_step(d, g, 0.1 * EPS) for d, g in zip(delta, gradients, strict=True)]
        assert agreeing(found[weight], torch.stack(delta)) > 0.99
    values = [slow_discriminant(list(delta), data.targets) for delta in found.values()]
    assert values[1] < values[0]


def test_tue_on_unlabelled_data(tmp_path: Path) -> None:
    data = Pictures(TWO_COPIES, COUNT)
    data.targets = [-1] * COUNT
    with pytest.raises(UserError, match="poison=tue tells classes apart and this data set has no"):
        fit(Small(), DataLoader(data, batch_size=COUNT), tmp_path, CraftTue(dir=str(tmp_path)))


def slow_sep(module: Any, kept_after: list[int], epochs: int, steps: int) -> Tensor:
    """Each step against the mean gradient of copies of the network, an image at a time."""
    data = Pictures(None, COUNT)
    clean, labels = data.clean(), data.targets
    copies = []
    for epoch in range(1, epochs + 1):
        slow_trained(module, list(clean), labels)
        if epoch in kept_after:
            copies.append(copy.deepcopy(module))
    delta = [torch.zeros(3, 16, 16) for _ in range(COUNT)]
    for row, label in enumerate(labels):
        for _ in range(steps):
            gradient = torch.zeros(3, 16, 16)
            for one in copies:
                leaf = delta[row].clone().requires_grad_()
                loss = slow_cross_entropy(one, (clean[row] + leaf).clamp(0, 1), 1 - label)
                gradient += torch.autograd.grad(loss, leaf)[0] / len(copies)
            delta[row] = slow_step(delta[row], gradient, 0.1 * EPS)
    return torch.stack(delta)


def test_sep_misleads_all_checkpoints_of_one_training(tmp_path: Path) -> None:
    settings: dict[str, Any] = {"checkpoints": 3, "pgd_steps": 4, "dtype": "float32"}
    module = TwoClasses()
    expected = slow_sep(copy.deepcopy(module), [20, 40, 60], 60, 4)
    last = slow_sep(copy.deepcopy(module), [60], 60, 4)
    craft = CraftSep(**settings, dir=str(tmp_path))
    found = crafted(tmp_path, module, craft, epochs=60)
    assert agreeing(found, expected) > 0.99
    assert agreeing(found, last) < 0.99
    assert Poison.load(tmp_path / "poison.safetensors").info["poison"] == "sep"
    ends = craft._host.states[-1]  # the surrogate is left as it was trained
    assert all(torch.equal(value, ends[name]) for name, value in module.state_dict().items())


def test_the_target_of_sep_is_half_the_classes_on() -> None:
    """g(y) = (y + 5) % 10 on CIFAR-10, (y + 50) % 100 on CIFAR-100."""
    for classes in (10, 100):
        host = EnsembleHost(Small(), lambda sample, views: (views[0], sample))
        host.target_classes, host.shift = classes, max(1, classes // 2)
        labels = torch.arange(classes)
        batch = Batch(labels, labels, torch.zeros(classes, 3, 16, 16), labels)
        targets = host._own_batch([torch.zeros(classes, 3, 16, 16)], batch)[1]
        assert torch.equal(targets, (labels + classes // 2) % classes)


class Linear(pl.LightningModule):
    """A classifier without a bias on pixels."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.head = nn.Linear(3 * 16 * 16, 2, bias=False)

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return functional.cross_entropy(self.head(batch[0].flatten(1)), batch[1])

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.05)


class Start(pl.Callback):
    """Keeps what delta starts from."""

    def __init__(self, craft: Any) -> None:
        self._craft = craft

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        self.delta = self._craft.attack.perturbation.stored.clone()


def softmax(scores: Tensor) -> Tensor:
    return scores.exp() / scores.exp().sum()


def slow_pil(weights: Tensor, delta: Tensor, steps: int, shortcut: float) -> Tensor:
    """Gradients of both terms by hand, an image at a time; the paper's delta is subtracted."""
    data = Pictures(None, COUNT)
    moved = []
    for image, begun, label in zip(data.clean(), -delta, data.targets, strict=True):
        ours = begun
        for _ in range(steps):
            alone = softmax(weights @ ours.flatten())
            alone[label] -= 1  # of the cross-entropy with the label
            shown = image - ours
            inside = ((shown >= 0) & (shown <= 1)).float()
            told = softmax(weights @ shown.clamp(0, 1).flatten()) - 0.5  # of KL(uniform, f)
            gradient = shortcut * (weights.T @ alone).view_as(ours)
            gradient -= (1 - shortcut) * (weights.T @ told).view_as(ours) * inside
            ours = slow_step(ours, gradient, 0.1 * EPS)
        moved.append(-ours)
    return torch.stack(moved)


def test_pil_is_the_papers_attack_on_a_linear_classifier(tmp_path: Path) -> None:
    settings: dict[str, Any] = {"pgd_steps": 6, "shortcut": 0.5, "dtype": "float32"}
    craft, module = CraftPil(**settings, dir=str(tmp_path)), Linear()
    start, data = Start(craft), Pictures(transforms.ToTensor(), COUNT)
    loader = DataLoader(data, batch_size=COUNT)
    fit(module, loader, tmp_path, craft, start, max_epochs=3)
    poison, raw = Poison.load(tmp_path / "poison.safetensors"), RawDataset(data, None)
    rows = poison.rows([raw[row].key for row in range(COUNT)])
    found = poison.perturbation.gather(torch.as_tensor(rows))
    weights = module.head.weight.detach()
    assert not torch.equal(weights, Linear().head.weight)
    assert start.delta.abs().max() > 0.9 * EPS
    assert agreeing(found, slow_pil(weights, start.delta, 6, 0.5)) > 0.99
    assert agreeing(found, slow_pil(weights, start.delta, 6, 0.999)) < 0.99
    assert poison.info["poison"] == "pil"


def test_pil_leaves_the_label_in_delta_and_nothing_else(tmp_path: Path) -> None:
    """Views may be normalised: delta is shown as it changes them."""
    normalised = transforms.Compose(
        [transforms.ToTensor(), transforms.Normalize([0.4] * 3, [0.25] * 3)]
    )
    data = Pictures(normalised, COUNT)
    craft, module = CraftPil(dir=str(tmp_path), dtype="float32"), Linear()
    fit(module, DataLoader(data, batch_size=COUNT), tmp_path, craft, max_epochs=20)
    poison, raw = Poison.load(tmp_path / "poison.safetensors"), RawDataset(data, None)
    delta = poison.perturbation.gather(
        torch.as_tensor(poison.rows([raw[row].key for row in range(COUNT)]))
    )
    with torch.no_grad():
        alone = module.head(-delta.flatten(1) / 0.25)
    assert alone.argmax(1).tolist() == data.targets


def test_the_shipped_classifier_of_pil_is_linear_on_pixels() -> None:
    cfg = complete(compose("supervised", ["+poison=pil", "data=cifar10"]))
    cfg.data.num_classes = 10
    module = build_method(cfg, 32)
    (weights,) = module.parameters()
    assert weights.shape == (10, 3 * 32 * 32)
    (view,) = build_pipeline(cfg).transforms
    image = Image.fromarray(Pictures(None).images[0]).resize((32, 32))
    assert torch.equal(view(image), transforms.functional.to_tensor(image))
    settings = settings_of("pil")
    assert (settings.pgd_steps, settings.step_size, settings.shortcut) == (30, 0.1, 0.9)
    assert (cfg.max_epochs, cfg.optimizer.lr) == (30, pytest.approx(0.003))


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ("augmentations.0.crop_size=16", "shows delta itself to the classifier, and views have 16"),
        ("+backbone.kwargs.depth=3", "backbone.name=pixels has no settings"),
        ("poison.shortcut=1", "poison.shortcut must be in"),
    ],
)
def test_mistakes_with_pil(change: str, text: str, call: Any, image_folder: Any) -> None:
    folder = image_folder()
    data = ["data.dataset=custom", f"data.train_path={folder}", "optimizer.batch_size=6"]
    sized = ["poison.image_size=32", "max_epochs=1", "data.num_workers=0"]
    overrides = ["+poison=pil", *data, *sized, change]
    code, _, error = call("pretrain", "--config-name", "supervised", *overrides)
    assert code == 2
    assert text in error


def test_a_strength_out_of_range() -> None:
    cfg = complete(compose("supervised", ["+poison=aue", "augmentations.0.strength=2"]))
    with pytest.raises(UserError, match=r"augmentations\.strength must be in \[0, 1\], got 2"):
        build_pipeline(cfg)


@pytest.mark.parametrize(
    ("method", "poison"),
    [
        ("supervised", ["+poison=aue", "poison.rounds=1", "poison.pgd_steps=1"]),
        ("supervised", ["+poison=aap", "poison.pgd_steps=2", "max_epochs=1"]),
        ("supervised", ["+poison=pil", "poison.pgd_steps=2"]),
        ("supervised", ["+poison=sep", "poison.pgd_steps=2", "poison.checkpoints=2"]),
        ("byol", ["+poison=tue", "poison.rounds=1", "poison.pgd_steps=1"]),
    ],
)
def test_a_poison_is_crafted_from_the_command_line_and_injected(
    method: str, poison: list[str], call: Any, image_folder: Any, tmp_path: Path
) -> None:
    folder = image_folder()
    small = [
        *("max_epochs=1", "optimizer.batch_size=6"),
        *("data.num_workers=0", "data.dataset=custom"),
        *(f"data.train_path={folder}", f"data.val_path={folder}"),
    ]
    code, _, error = call("pretrain", "--config-name", method, *small, *poison)
    assert code == 0, error
    (file,) = tmp_path.rglob("poison.safetensors")
    made = Poison.load(file)
    assert made.info["poison"] == poison[0].partition("=")[2]
    rows = made.perturbation.gather(torch.arange(len(made.perturbation)))
    assert 0 < rows.abs().max() <= made.eps * (1 + 1e-3)
    used = ["+poison=inject", f"poison.path={file}"]
    code, _, error = call("pretrain", "--config-name", "simclr", *small, *used)
    assert code == 0, error
    (victim,) = (tmp_path / "trained_models" / "simclr").rglob("result.json")
    assert json.loads(victim.read_text())["surrogate"].lower() == method


class Unlabelled(Pictures):
    """Pictures without classes."""

    def __init__(self, transform: Any, count: int = COUNT) -> None:
        super().__init__(transform, count)
        self.targets = [-1] * count


def slow_clusters(
    module: Any, clean: list[Tensor], cluster: list[int], centres: Tensor, steps: int, step: float
) -> list[Tensor]:
    """A delta at a time: down the angle between its images and the next cluster's centre."""
    delta = [torch.zeros(3, 16, 16) for _ in centres]
    for _ in range(steps):
        moved = []
        for k, own in enumerate(delta):
            leaf = own.clone().requires_grad_()
            wrong = centres[(k + 1) % len(centres)]
            total = torch.zeros(())
            for image, of_image in zip(clean, cluster, strict=True):
                if of_image == k:
                    feature = module.backbone((image + leaf).clamp(0, 1)[None])[0]
                    cosine = (feature * wrong).sum() / (feature.norm() * wrong.norm())
                    total = total + 1 - cosine
            moved.append(slow_step(own, torch.autograd.grad(total, leaf)[0], step))
        delta = moved
    return delta


def test_unlearnable_clusters_move_each_cluster_to_the_next_ones_centre(tmp_path: Path) -> None:
    """All images in one batch, both views the image itself; no labels."""
    steps: dict[str, Any] = {"clusters": 3, "epochs": 6, "step_size": 0.1, "eps": EPS}
    data, module, seen = Unlabelled(TWO_COPIES), Small(), {}
    craft = CraftUnlearnableClusters(**steps, dir=str(tmp_path))

    def placed(encoder: Any, centres: Tensor) -> Any:
        seen.update(encoder=copy.deepcopy(encoder), centres=centres)
        return {}, {}

    craft.placed = placed
    start = copy.deepcopy(module)
    fit(module, DataLoader(data, batch_size=COUNT), tmp_path, craft, max_epochs=3)
    views = torch.stack(list(data.clean()))
    optimizer = torch.optim.SGD(start.parameters(), lr=0.05)
    for _ in range(3):  # on clean images
        optimizer.zero_grad()
        start.training_step(([views, views], None), 0).backward()
        optimizer.step()
    for found, expected in zip(module.parameters(), start.parameters(), strict=True):
        assert torch.allclose(found, expected, atol=1e-6)
    poison, raw = Poison.load(tmp_path / "poison.safetensors"), RawDataset(data, None)
    rows = poison.rows([raw[row].key for row in range(COUNT)])
    with torch.no_grad():
        directions = functional.normalize(start.backbone(views))
    assert rows.tolist() == torch.cdist(directions, seen["centres"]).argmin(1).tolist()
    assert poison.info["poison"] == "unlearnable_clusters"
    delta = poison.perturbation.gather(torch.arange(3))
    expected = slow_clusters(
        start, list(data.clean()), rows.tolist(), seen["centres"], 6, 0.1 * EPS
    )
    assert agreeing(delta, torch.stack(expected)) > 0.99
    assert delta.abs().max() == pytest.approx(0.6 * EPS)
    wrong = seen["centres"][(rows + 1) % 3]
    with torch.no_grad():
        moved = functional.normalize(start.backbone((views + delta[rows]).clamp(0, 1)))
    before, after = ((one * wrong).sum(1).mean() for one in (directions, moved))
    assert after > before


def test_unlearnable_clusters_have_the_papers_settings() -> None:
    found = settings_of("unlearnable_clusters")
    assert (found.eps, found.clusters, found.epochs) == (pytest.approx(16 / 255), 10, 50)
    selection = Selection.of({"name": "unlearnable_clusters"}, None)
    assert selection.crafts
    assert not selection.needs_classifier
    with pytest.raises(UserError, match=r"poison\.clusters must be 2 or more, got 1"):
        CraftUnlearnableClusters(clusters=1)
    cfg = compose("simclr", ["+poison=unlearnable_clusters"])
    assert cfg.method == "simclr"
