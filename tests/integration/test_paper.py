"""`+paper=NAME` takes the steps of the code that He, Zha and Katabi released (ICLR 2023).

Their formulas are written out here as loops, on the weights of our networks: what their optimiser
then does to a weight, ours has to do too.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import timm
import torch
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import Callback
from omegaconf import DictConfig, OmegaConf
from torch import Tensor, nn
from torch.nn.functional import cosine_similarity, normalize
from torch.utils.data import DataLoader, Dataset

from cp_plugin.apps.hydra_app import compose
from cp_plugin.config.settings import UserError
from cp_plugin.data.batch import Batch
from cp_plugin.engine.methods import build_method
from cp_plugin.engine.optimisation import build_optimizer, build_scheduler
from cp_plugin.engine.pipeline import build_pipeline, normalisation
from cp_plugin.engine.run import check
from cp_plugin.hosts.gradients import momentum_gradients
from cp_plugin.hosts.lightning import LightningHost
from cp_plugin.mirror import mirror

pytestmark = pytest.mark.filterwarnings("ignore")  # Lightning's, which it raises about itself
METHODS = ("simclr", "mocov2plus", "byol")
GPUS, BATCH, STEPS = 4, 512, 97
"""Of the authors' runs: 97 whole batches are an epoch of 50,000 images."""
THEIR_RATE = {"simclr": 0.5, "mocov2plus": 0.3, "byol": 1.0}
THEIR_DECAY, THEIR_WARMUP, FLOOR = 1e-4, 0.01, 1e-3
TEMPERATURE = {"simclr": 0.5, "mocov2plus": 0.2}
BASE = 0.07
SMALL = ("backbone.kwargs.channels=[8,8,8,8]", "backbone.kwargs.layers=[1,1,1,1]")
VICTIM, SURROGATE = ("+poison=none",), ("+poison=cp_class",)


def settings(method: str, *overrides: str) -> DictConfig:
    return check(compose(method, [f"+paper={method}", *overrides]))[1]


def small_method(method: str, *overrides: str) -> Any:
    torch.manual_seed(0)
    cfg = settings(method, *SMALL, *overrides)
    return build_method(cfg, 32).double()


def two_views(seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.rand(8, 3, 32, 32, generator=generator, dtype=torch.float64) for _ in range(2)]


# -- their formulas ------------------------------------------------------------------------------


def simclr_on_a_gpu(projections: Tensor, rank: int) -> Tensor:
    """Their loss on one GPU: over all images, of which only its own carry a gradient.

    Args:
        projections: (2B, D), the first views of all images, then the second.
        rank: of the GPU; it holds the images from rank B / 4 on.
    """
    z, count = normalize(projections, dim=1), len(projections) // 2
    own = range(rank * count // GPUS, (rank + 1) * count // GPUS)
    rows = [z[i] if i % count in own else z[i].detach() for i in range(2 * count)]
    total = z.new_zeros(())
    for i, anchor in enumerate(rows):
        scores = [anchor @ other / TEMPERATURE["simclr"] for other in rows]
        others = torch.stack([score for j, score in enumerate(scores) if j != i])
        total = total - (scores[(i + count) % (2 * count)] - others.exp().sum().log())
    return TEMPERATURE["simclr"] / BASE * total / (2 * count)


def moco_loss(queries: Tensor, keys: Tensor, queue_KD: Tensor) -> Tensor:
    """Their loss of one direction; the queue has no gradient."""
    total = queries.new_zeros(())
    for query, key in zip(normalize(queries, dim=1), normalize(keys, dim=1), strict=True):
        scores = torch.cat([(query @ key)[None], queue_KD @ query]) / TEMPERATURE["mocov2plus"]
        total = total - (scores[0] - scores.exp().sum().log())
    return TEMPERATURE["mocov2plus"] / BASE * total / len(queries)


def byol_loss(p0: Tensor, z0: Tensor, p1: Tensor, z1: Tensor) -> Tensor:
    """Their loss: it detaches the targets, whatever the flag for a second branch says."""
    first = -cosine_similarity(p0, z1.detach(), dim=-1).mean() / 2
    return first - cosine_similarity(p1, z0.detach(), dim=-1).mean() / 2


def their_loss(method: str, net: Any, views: Sequence[Tensor], rank: int = 0) -> Tensor:
    """Their loss on the weights of our network, norm layers synchronised as in victims."""
    x0, x1 = views
    if method == "simclr":
        return simclr_on_a_gpu(net.projection_head(net.backbone(torch.cat([x0, x1]))), rank)
    momentum = nn.Sequential(net.backbone_momentum, net.projection_head_momentum)
    online = nn.Sequential(net.backbone, net.projection_head)
    if method == "mocov2plus":
        return moco_loss(online(x0), momentum(x1), net.criterion.memory_bank.bank)
    p0, p1 = (net.prediction_head(online(x)) for x in (x0, x1))
    return byol_loss(p0, momentum(x0), p1, momentum(x1))


def their_gradient(method: str, net: Any, views: Sequence[Tensor]) -> list[Tensor]:
    """What DDP hands to their optimiser: the mean over the GPUs."""
    weights = [weight for weight in net.parameters() if weight.requires_grad]
    ranks = range(GPUS) if method == "simclr" else range(1)  # elsewhere a mean of means
    parts = [torch.autograd.grad(their_loss(method, net, views, rank), weights) for rank in ranks]
    return [sum(part) / len(ranks) for part in zip(*parts, strict=True)]


def their_rate(method: str, epoch: int, step: int, warm: bool) -> float:
    """Their learning rate at a step (from 0) of an epoch (from 1) of 1,000."""
    rate = THEIR_RATE[method]

    def cosine(at: int) -> float:
        low = rate * FLOOR
        return low + (rate - low) * (1 + math.cos(math.pi * at / 1000)) / 2

    if not warm or epoch > 10:
        return cosine(epoch)
    done = ((epoch - 1) * STEPS + step) / (10 * STEPS)
    return THEIR_WARMUP + done * (cosine(10) - THEIR_WARMUP)


# -- ours against them ---------------------------------------------------------------------------


class Epoch(Dataset[Any]):
    """One batch, again and again."""

    def __init__(self, views: list[Tensor]) -> None:
        self.views = views

    def __len__(self) -> int:
        return STEPS

    def __getitem__(self, row: int) -> Any:
        return self.views, torch.zeros(8, dtype=torch.long)


class OneStep(Callback):
    """Ends training after the first step."""

    def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
        trainer.should_stop = True


def trained_one_step(net: Any, views: list[Tensor]) -> None:
    trainer = Trainer(
        max_epochs=1000, accelerator="cpu", callbacks=[OneStep()], logger=False,
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    trainer.fit(net, DataLoader(Epoch(views), batch_size=None))
    assert trainer.global_step == 1


@pytest.mark.parametrize("method", METHODS)
def test_the_first_step_is_theirs(method: str) -> None:
    """Learning rate times (gradient + weight decay x weight), through our optimiser and trainer."""
    net, views = small_method(method, *SURROGATE), two_views()
    before = {name: weight.detach().clone() for name, weight in net.named_parameters()}
    gradient = their_gradient(method, copy.deepcopy(net).train(), views)
    trained = [name for name, weight in net.named_parameters() if weight.requires_grad]
    trained_one_step(net, views)
    after = dict(net.named_parameters())
    assert max(float(part.abs().max()) for part in gradient) > 1e-4
    for name, part in zip(trained, gradient, strict=True):
        theirs = -THEIR_RATE[method] * (part + THEIR_DECAY * before[name])
        ours = after[name].detach() - before[name]
        torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-12, msg=lambda m, n=name: n + m)


@pytest.mark.parametrize(("method", "m", "times"), [("mocov2plus", 0.99, 1), ("byol", 0.999, 2)])
def test_the_momentum_branch_moves_as_theirs(method: str, m: float, times: int) -> None:
    """Theirs moves before the forward pass of the next step: once for MoCo, twice for BYOL."""
    net = small_method(method, *SURROGATE)
    theirs = [weight.detach().clone() for weight in momentum_weights(net)]
    trained_one_step(net, two_views())
    online = [*net.backbone.parameters(), *net.projection_head.parameters()]
    for _ in range(times):
        theirs = [m * old + (1 - m) * new.detach() for old, new in zip(theirs, online, strict=True)]
    for ours, expected in zip(momentum_weights(net), theirs, strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-9, atol=1e-12)


def momentum_weights(net: Any) -> list[Tensor]:
    return [*net.backbone_momentum.parameters(), *net.projection_head_momentum.parameters()]


@pytest.mark.parametrize(
    ("method", "poison"),
    [("mocov2plus", "cp_class"), ("byol", "cp_class_byol"), ("byol", "cp_byol")],
)
def test_the_noise_goes_where_theirs_goes(method: str, poison: str) -> None:
    """Signs of the gradient to the images: both branches of MoCo, one of BYOL."""
    selection, _ = check(compose(method, [f"+paper={method}", f"+poison={poison}"]))
    net = small_method(method, f"+poison={poison}").eval()
    host = LightningHost(net, lambda sample, views: (views, *sample[1:]))
    images = two_views()
    numbers = torch.arange(8)
    batch = Batch(numbers, numbers, images[0], (images, torch.zeros(8)))

    def gradient(loss: Callable[[Sequence[Tensor]], Tensor]) -> list[Tensor]:
        leaves = [image.clone().requires_grad_() for image in images]
        found = torch.autograd.grad(loss(leaves), leaves, allow_unused=True)
        return [torch.zeros_like(x) if g is None else g for g, x in zip(found, leaves, strict=True)]

    host.detect_momentum(images, batch)
    theirs = gradient(lambda views: their_loss(method, net, views))
    assert selection.poison is not None
    dual = bool(selection.poison.uses_dual_branch)  # type: ignore[union-attr]

    def ours(views: Sequence[Tensor]) -> Tensor:
        if not dual:
            return host.loss(views, batch)
        with momentum_gradients(host.module, host.momentum_modules()):
            return host.loss(views, batch)

    for mine, expected in zip(gradient(ours), theirs, strict=True):
        strong = expected.abs() > 1e-12
        assert strong.any()
        torch.testing.assert_close(mine[strong].sign(), expected[strong].sign())


@pytest.mark.parametrize("run", [VICTIM, SURROGATE], ids=["victim", "surrogate"])
@pytest.mark.parametrize("method", METHODS)
def test_the_schedule_is_theirs(method: str, run: Sequence[str]) -> None:
    """Within 2 % of the highest rate: our cosine starts after the warm-up, theirs runs below it."""
    cfg = settings(method, *run)
    weight = nn.Parameter(torch.zeros(1))
    optimizer = build_optimizer([weight], cfg)
    steps = STEPS * 1000
    trainer: Any = type("", (), {"estimated_stepping_batches": steps, "accumulate_grad_batches": 1,
                                 "num_training_batches": STEPS})  # fmt: skip
    schedule: Any = build_scheduler(optimizer, cfg, trainer)
    factor = cfg.optimizer.lr / THEIR_RATE[method]

    def ours(step: int) -> float:
        return cfg.optimizer.lr * schedule["scheduler"].lr_lambdas[0](step) / factor

    assert schedule["interval"] == "step"
    assert ours(0) == pytest.approx(optimizer.param_groups[0]["lr"] / factor)
    warm = run is VICTIM
    for epoch in (1, 2, 5, 10, 11, 100, 500, 900, 1000):
        theirs = their_rate(method, epoch, 0, warm)
        assert ours((epoch - 1) * STEPS) == pytest.approx(theirs, abs=0.02 * THEIR_RATE[method])
    if warm:  # ours is a step of the warm-up ahead
        assert ours(0) == pytest.approx(their_rate(method, 1, 1, warm), rel=0.002)
    assert ours(steps - 1) == pytest.approx(FLOOR * THEIR_RATE[method], rel=0.01)


@pytest.mark.parametrize("method", METHODS)
def test_network_and_views_are_theirs(method: str) -> None:
    cfg = settings(method, *VICTIM)
    assert (cfg.data.dataset, cfg.optimizer.batch_size, cfg.max_epochs) == ("cifar10", BATCH, 1000)
    backbone = build_method(cfg, 32).backbone
    whole = timm.create_model("resnet18", num_classes=0)
    # The stem for small images is 3 x 3 instead of 7 x 7.
    assert count(whole) - count(backbone) == 64 * 3 * (7 * 7 - 3 * 3)
    norms = [layer for layer in backbone.modules() if isinstance(layer, nn.BatchNorm2d)]
    assert all(bool((layer.weight == 1).all()) for layer in norms)
    pipeline = build_pipeline(cfg)
    crop = pipeline.transforms[0].transforms[0]
    assert (crop.interpolation.value, tuple(crop.scale)) == ("bilinear", (0.2, 1.0))
    assert mirror(pipeline).views == 2
    node = cfg.augmentations[0]
    assert normalisation("cifar10", node) == ((0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010))
    assert normalisation("cifar100", node)[1] == (0.2675, 0.2565, 0.2761)
    assert normalisation("stl10", node) == normalisation("stl10", {})
    (last,) = [step for step in pipeline.transforms[0].transforms if hasattr(step, "std")]
    assert tuple(last.std) == (0.2023, 0.1994, 0.2010)


@pytest.mark.parametrize(
    ("key", "value", "text"),
    [
        ("rrc.interpolation", "cubic", "interpolation must be one of nearest, .* got 'cubic'"),
        (
            "statistics",
            {"svhn": {"mean": [0.5]}},
            "svhn must hold mean and std, got .*; give",
        ),
        ("statistic", {}, "augmentations.statistic is not known"),
    ],
)
def test_views_that_cannot_be_made_are_refused(key: str, value: Any, text: str) -> None:
    cfg = settings("simclr", *VICTIM)
    OmegaConf.update(cfg.augmentations[0], key, value, force_add=True)
    with pytest.raises(UserError, match=text):
        build_pipeline(cfg)


def test_a_surrogates_warm_up_is_checked() -> None:
    with pytest.raises(UserError, match="must be a number of epochs, got -1; give 0 or more"):
        settings("simclr", *SURROGATE, "scheduler.surrogate_warmup_epochs=-1")


def count(module: nn.Module) -> int:
    """Return the number of weights."""
    return sum(weight.numel() for weight in module.parameters())
