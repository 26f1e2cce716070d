"""Defences inside trainers: what the victim sees, what is refused, what is put back."""

import json

import lightning.pytorch
import pytest
import torch
from lightly.transforms.simclr_transform import SimCLRTransform
from torch import nn
from torch.nn import functional
from torch.utils.data import DataLoader
from torchvision import transforms

from cp_plugin import CraftPoison, Defence, InjectPoison, Poison
from cp_plugin.apps.hydra_app import compose
from cp_plugin.attack.perturbation import Perturbation
from cp_plugin.callbacks import MirrorViews
from cp_plugin.config.defences import DpSgdConfig, OrthogonalConfig
from cp_plugin.config.settings import UserError
from cp_plugin.data import Photos
from cp_plugin.defences import (
    BitDepth,
    Denoiser,
    Grey,
    Jpeg,
    Private,
    Projection,
    Smoothing,
    with_group_norm,
)
from cp_plugin.defences.projection import fitted_weights
from cp_plugin.engine.methods import build_method
from cp_plugin.engine.run import check, run
from cp_plugin.engine.settings import complete
from tests.support.own_module import ROOTS, simclr, trainer

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*does not have many workers.*"),
    pytest.mark.filterwarnings("ignore:.*logging interval.*"),
    pytest.mark.filterwarnings("ignore:.*`isinstance.treespec, LeafSpec.*"),
    # A run's folder holds its configuration before Lightning sees it.
    pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty"),
    # Opacus hooks the first layer too, and images need no gradient.
    pytest.mark.filterwarnings("ignore:Full backward hook is firing:UserWarning"),
]
ROOT = lightning.pytorch


class Classifier(ROOT.LightningModule):
    """A user's supervised module."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.network = nn.Sequential(
            nn.Conv2d(3, 8, 3, stride=2), nn.BatchNorm2d(8), nn.ReLU(inplace=True)
        )
        self.head = nn.Linear(8, 12)
        self.seen = []

    def training_step(self, batch, batch_idx):
        view, target = batch
        logits = self.head(self.network(view).mean((2, 3)))
        loss = functional.cross_entropy(logits, target)
        self.seen.append((view.detach().clone(), target, loss.item()))
        return loss

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.05)


def photos(transform=None, patches=4):
    transform = transform or SimCLRTransform(input_size=32, gaussian_blur=0)
    return Photos(train=True, patches=patches, transform=transform)


def plain():
    normalize = transforms.Normalize((0.5, 0.5, 0.5), (0.25, 0.25, 0.25))
    return photos(transforms.Compose([transforms.ToTensor(), normalize]))


def fit(module, data, tmp_path, *callbacks, root=ROOT, **settings):
    root.seed_everything(0, verbose=False)
    chosen = {"max_epochs": 1, "limit_train_batches": 1} | settings
    batches = DataLoader(data, batch_size=48)
    trainer(root, tmp_path, *callbacks, **chosen).fit(module, batches)
    assert batches.dataset is data
    assert "training_step" not in vars(module)
    return module


@pytest.mark.parametrize("root", ROOTS.values(), ids=ROOTS)
def test_noise_reaches_the_views_of_any_module(root, tmp_path):
    (clean, _), (noisy, _) = (
        fit(simclr(root), photos(), tmp_path, *callbacks, root=root).seen[0]
        for callbacks in ([], [Defence("noise", std="8/255")])
    )
    change = (noisy - clean) * torch.tensor((0.229, 0.224, 0.225))[:, None, None]
    inside = (noisy > noisy.amin((0, 2, 3), True)) & (noisy < noisy.amax((0, 2, 3), True))
    assert change[inside].std().item() == pytest.approx(8 / 255, rel=0.1)


@pytest.mark.parametrize("mirrored", [False, True])
def test_smoothing_comes_after_the_poison_and_before_the_transform(mirrored, tmp_path):
    data = plain()
    delta = torch.linspace(-8, 8, 12 * 3072).round().view(12, 3, 32, 32) / 255
    poison = Poison(Perturbation(delta.contiguous(), 8 / 255), "class", classes=data.classes)
    callbacks = [InjectPoison(poison), Defence("smoothing", kind="median")]
    module = fit(Classifier(), data, tmp_path, *callbacks, *[MirrorViews()] * mirrored)
    view, targets, _ = module.seen[0]
    clean = torch.from_numpy(data.data).permute(0, 3, 1, 2)
    expected = Smoothing("median")(poison.apply(clean, targets))
    assert torch.equal((view * 0.25 + 0.5).mul(255).round().to(torch.uint8), expected)


@pytest.mark.parametrize(
    ("name", "change"), [("jpeg", Jpeg()), ("grey", Grey()), ("bit_depth", BitDepth())]
)
def test_squeezing_comes_after_the_poison_and_before_the_transform(name, change, tmp_path):
    data = plain()
    delta = torch.linspace(-8, 8, 12 * 3072).round().view(12, 3, 32, 32) / 255
    poison = Poison(Perturbation(delta.contiguous(), 8 / 255), "class", classes=data.classes)
    module = fit(Classifier(), data, tmp_path, InjectPoison(poison), Defence(name))
    view, targets, _ = module.seen[0]
    clean = torch.from_numpy(data.data).permute(0, 3, 1, 2)
    expected = change(poison.apply(clean, targets))
    assert torch.equal((view * 0.25 + 0.5).mul(255).round().to(torch.uint8), expected)


def test_a_purifier_cleans_the_poisoned_images_before_the_transform(tmp_path):
    data = plain()
    delta = torch.linspace(-8, 8, 12 * 3072).round().view(12, 3, 32, 32) / 255
    poison = Poison(Perturbation(delta.contiguous(), 8 / 255), "class", classes=data.classes)
    torch.manual_seed(0)
    denoiser = Denoiser(3, 4).eval()
    path = str(denoiser.save(tmp_path / "denoiser.safetensors"))
    defence = Defence("purify", path=path)
    view, targets, _ = fit(Classifier(), data, tmp_path, InjectPoison(poison), defence).seen[0]
    poisoned = poison.apply(torch.from_numpy(data.data).permute(0, 3, 1, 2), targets)
    expected = denoiser(poisoned)
    assert torch.equal((view * 0.25 + 0.5).mul(255).round().to(torch.uint8), expected)
    assert (expected != poisoned).float().mean() > 0.5
    assert defence.facts().keys() == {"denoiser_seconds", "purification_seconds"}


def test_projection_is_fitted_to_the_poisoned_images(tmp_path):
    data = plain()
    delta = torch.linspace(-8, 8, 12 * 3072).round().view(12, 3, 32, 32) / 255
    poison = Poison(Perturbation(delta.contiguous(), 8 / 255), "class", classes=data.classes)
    defence = Defence("orthogonal", seed=3)
    view, targets, _ = fit(Classifier(), data, tmp_path, InjectPoison(poison), defence).seen[0]
    poisoned = poison.apply(torch.from_numpy(data.data).permute(0, 3, 1, 2), targets)
    weights = fitted_weights(poisoned.flatten(1), targets, OrthogonalConfig(), 3)
    expected = Projection(weights)(poisoned)
    off = (view * 0.25 + 0.5).mul(255).round() - expected.float()
    assert off.abs().max() <= 1  # halves
    assert (off != 0).float().mean() < 1e-3
    assert (expected != poisoned).float().mean() > 0.1
    assert defence.facts()["projection_seconds"] >= 0


def test_ueraser_trains_on_the_worst_of_its_draws_and_leaves_no_other_trace(tmp_path):
    runs = []  # outside of the module, which is put back after each that is tried

    class Watched(Classifier):
        def training_step(self, batch, batch_idx):
            before = self.network[1].running_mean.clone()
            loss = super().training_step(batch, batch_idx)
            runs.append((loss.item(), before))
            return loss

    fit(Watched(), plain(), tmp_path, Defence("ueraser", draws=4))
    *tried, trained = runs
    assert len(tried) == 4
    losses = [loss for loss, _ in tried]
    assert trained[0] == pytest.approx(max(losses), rel=1e-5)
    assert max(losses) > min(losses)
    assert all(torch.equal(before, trained[1]) for _, before in tried)  # as none was tried
    for form, count in (({"form": "mean"}, 2), ({"worst_epochs": 1}, 5 + 1)):
        runs.clear()
        fit(Watched(), plain(), tmp_path, Defence("ueraser", draws=4, **form), max_epochs=2)
        assert len(runs) == count


def test_ueraser_on_a_supervised_victim_takes_the_worst_of_each_image():
    cfg = complete(compose("supervised", ["backbone.kwargs.channels=[8,8,8,8]"]))
    cfg.data.num_classes = 3
    module = build_method(cfg, 32).eval()
    views = [torch.randn(4, 3, 32, 32) for _ in range(2)]
    labels = torch.tensor([0, 2, -1, 1])
    with torch.no_grad():
        found = module.image_losses((views, labels))
        for row, label in enumerate(labels.tolist()):
            terms = [-functional.log_softmax(module(view)[row], 0)[label] for view in views]
            expected = 0 if label < 0 else sum(terms) / 2
            assert float(found[row]) == pytest.approx(float(expected), abs=1e-5)


def test_completions_replace_the_images(tmp_path):
    data = plain()
    defence = Defence("matrix_completion", completions=2, iterations=20)
    view, _, _ = fit(Classifier(), data, tmp_path, defence).seen[0]
    clean = torch.from_numpy(data.data).permute(0, 3, 1, 2).float() / 255
    error = (view * 0.25 + 0.5 - clean).abs()
    assert 0.005 < error.mean() < 0.1
    assert defence.facts()["completion_seconds"] >= 0


def test_cutout_differs_between_views(tmp_path):
    class Both(type(simclr(ROOT))):
        def training_step(self, batch, batch_idx):
            self.holes = [(view == 0).all(1) for view in batch[0]]
            return super().training_step(batch, batch_idx)

    module = simclr(ROOT)
    module.__class__ = Both
    fit(module, photos(), tmp_path, Defence("cutout", size=0.25))
    first, second = module.holes
    assert 16 <= first.sum((1, 2)).max() <= 64
    assert not torch.equal(first, second)


def test_adversarial_training_raises_the_victims_loss_and_leaves_no_other_trace(tmp_path):
    outcomes = {}
    for name, callbacks in {"clean": [], "moved": [Defence("adversarial", eps=0.05)]}.items():
        module = fit(Classifier(), plain(), tmp_path, *callbacks)
        outcomes[name] = (module.seen[-1], module.network[1].num_batches_tracked.item())
    (clean, moved), counts = zip(*outcomes.values(), strict=True)
    assert counts == (1, 1)
    assert moved[2] > clean[2] + 0.01
    assert 0.04 < (moved[0] - clean[0]).abs().max() * 0.25 <= 0.05 + 1e-6


@pytest.mark.parametrize("name", ["mixup", "cutmix"])
def test_mixed_labels_reach_a_supervised_module(name, tmp_path):
    view, target, _ = fit(Classifier(), plain(), tmp_path, Defence(name)).seen[0]
    assert target.shape == (48, 12)
    assert torch.allclose(target.sum(1), torch.ones(48))
    assert view.shape == (48, 3, 32, 32)


def test_private_training_spends_its_budget(tmp_path):
    pytest.importorskip("opacus")
    data, module, defence = plain(), Classifier(), Defence("dp_sgd", epsilon=5, delta=1e-3)
    batches = DataLoader(data, batch_size=16)
    trainer(ROOT, tmp_path, defence, max_epochs=3).fit(module, batches)
    assert 4.5 < defence.facts()["epsilon_spent"] <= 5
    assert isinstance(module.network[1][0], nn.GroupNorm)
    sizes = {len(target) for _, target, _ in module.seen}
    assert len(module.seen) == 9
    assert len(sizes) > 1  # drawn by chance, not cut into equal batches
    assert type(batches.batch_sampler) is torch.utils.data.BatchSampler


@pytest.mark.parametrize("name", ["mixup", "cutmix", "dp_sgd"])
def test_a_module_that_compares_views_is_refused(name, tmp_path):
    pytest.importorskip("opacus")
    with pytest.raises(UserError, match=r"the loss of SimCLR (has no labels|compares)"):
        fit(simclr(ROOT), photos(), tmp_path, Defence(name))


def test_a_defence_belongs_to_a_victim(tmp_path):
    """In which order callbacks stand makes no difference: test_banks_in_any_order.py."""
    with pytest.raises(UserError, match="belongs to a victim"):
        fit(simclr(ROOT), photos(), tmp_path, CraftPoison(rounds=1), Defence("noise"))


@pytest.mark.parametrize("name", ["mixup", "cutmix", "dp_sgd"])
@pytest.mark.parametrize("method", ["simclr", "byol", "mocov2plus", "supcon"])
def test_a_configuration_is_refused_before_anything_is_read(name, method):
    with pytest.raises(UserError, match=f"defence={name} .* the loss of {method}"):
        check(compose(method, [f"+defence={name}"]))
    check(compose("supervised", [f"+defence={name}"]))


def test_a_private_run_of_the_engine_tells_its_defence(image_folder, tmp_path):
    pytest.importorskip("opacus")
    folder = image_folder(per_class=16)
    overrides = [
        *("+defence=dp_sgd", "data=custom", f"data.train_path={folder}", "data.num_workers=0"),
        *("optimizer.batch_size=16", "max_epochs=1", f"checkpoint.dir={tmp_path / 'runs'}"),
    ]
    result = run(compose("supervised", overrides))
    assert "none-dp_sgd-" in result["folder"]
    written = json.loads((tmp_path / result["folder"] / "result.json").read_text())
    assert written["defence"] == "dp_sgd"
    assert written["defence_settings"] == {"epsilon": 8.0, "delta": 1e-05, "max_grad_norm": 1.0}
    assert 7 < written["defence_facts"]["epsilon_spent"] <= 8
    from cp_plugin.apps.engine_runs import load_run

    module, _ = load_run(tmp_path / result["folder"])
    norms = [m for m in module.modules() if isinstance(m, (nn.GroupNorm, nn.BatchNorm2d))]
    assert norms
    assert all(isinstance(norm, nn.GroupNorm) for norm in norms)


# Opacus hooks the first layer too, and images need no gradient.
@pytest.mark.filterwarnings("ignore:Full backward hook is firing:UserWarning")
def test_opacus_confirms_the_budget_and_gradients_are_clipped():
    pytest.importorskip("opacus")
    from opacus.accountants.analysis import rdp

    torch.manual_seed(0)
    network = nn.Sequential(
        nn.Conv2d(3, 8, 3),
        nn.BatchNorm2d(8),
        nn.ReLU(inplace=True),
        nn.Flatten(),
        nn.Linear(288, 4),
    )
    with_group_norm(network)
    config = DpSgdConfig(epsilon=4.0, delta=1e-4, max_grad_norm=0.1)
    sgd = torch.optim.SGD(network.parameters(), lr=1.0)
    private = Private(network, sgd, config, images=400, batch_size=40, steps=20)
    before = [parameter.detach().clone() for parameter in network.parameters()]
    for _ in range(20):
        private.optimizer.zero_grad()
        loss = functional.cross_entropy(network(torch.rand(40, 3, 8, 8)), torch.randint(4, (40,)))
        loss.backward()
        clipped = [p.grad_sample.flatten(1) for p in network.parameters()]
        assert torch.cat(clipped, 1).shape[0] == 40
        private.optimizer.step()
    facts = private.facts()
    assert 3.8 < facts["epsilon_spent"] <= 4.0
    orders = [1 + x / 10 for x in range(1, 100)] + list(range(12, 64))
    divergence = rdp.compute_rdp(
        q=0.1, noise_multiplier=facts["noise_multiplier"], steps=20, orders=orders
    )
    epsilon, _ = rdp.get_privacy_spent(orders=orders, rdp=divergence, delta=1e-4)
    assert facts["epsilon_spent"] == pytest.approx(epsilon, rel=1e-6)
    moved = sum((a - b).square().sum() for a, b in zip(before, network.parameters(), strict=True))
    count = sum(parameter.numel() for parameter in before)
    # Noise of each step: std = multiplier * clip / batch a weight; gradients add at most 0.1 each.
    noise = facts["noise_multiplier"] * 0.1 / 40 * (20 * count) ** 0.5
    assert noise * 0.9 < moved.sqrt() < noise * 1.1 + 2
    private.stop()
    assert not hasattr(next(network.parameters()), "grad_sample")
