"""One suite for every method of solo-learn: what the attack may rely on."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from cp_plugin.config.settings import UserError
from cp_plugin.hosts.gradients import check_momentum_gradients, momentum_gradients, preserve_state
from cp_plugin.hosts.solo_learn import NOT_SERVED, SoloHost
from tests.bench.readme import EXAMPLES, solo_methods
from tests.support.solo_modules import (
    BATCH,
    SIDE,
    batch,
    make,
    views_of,
    with_views,
)
from tests.support.solo_served import MOMENTUM, SERVED

pytestmark = [
    pytest.mark.usefixtures("double_precision"),
    # Of what solo-learn uses: heads of DINO and SwAV, W-MSE's whitening.
    pytest.mark.filterwarnings("ignore:`torch.nn.utils.weight_norm` is deprecated"),
    pytest.mark.filterwarnings("ignore:torch.triangular_solve is deprecated"),
    pytest.mark.filterwarnings("ignore:The 'warn' function is deprecated"),  # of its backbones
]

STEP = 1e-4


class Hold(TorchFunctionMode):
    """Stop-gradients recorded at the first loss, and the same values in every later one."""

    def __init__(self) -> None:
        super().__init__()
        self.recorded: list[Any] = []
        self.at: int | None = None

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = getattr(func, "__name__", "")
        # Python calls `__get__` for attributes, autograd `view_as` for functions of one's own.
        is_operation = name not in ("__get__", "view_as")
        stops = name == "detach" or (is_operation and not torch.is_grad_enabled())
        tensors = [
            item
            for value in args
            for item in (value if isinstance(value, (list, tuple)) else [value])
            if isinstance(item, Tensor)
        ]
        if not stops or not any(tensor.requires_grad for tensor in tensors):
            return func(*args, **(kwargs or {}))
        if self.at is None:
            self.recorded.append(func(*args, **(kwargs or {})))
            return self.recorded[-1]
        self.at += 1
        return self.recorded[self.at - 1]


def loss(
    host: SoloHost, images: Tensor, delta: Tensor, hold: Hold, dual: bool = True, crops: int = 0
) -> Tensor:
    """The loss in the context `momentum_gradients`, the host's random numbers fixed."""
    torch.manual_seed(1)
    gradients = momentum_gradients(host.module, host.momentum_modules() if dual else ())
    with hold, gradients:
        value = host.loss(views_of(host, images + delta, crops), batch())
    check_momentum_gradients(gradients, value, delta)
    return value


def slope(
    host: SoloHost, images: Tensor, direction: Tensor, dual: bool, hold: Hold, crops: int = 0
) -> float:
    delta = torch.zeros_like(images, requires_grad=True)
    with preserve_state(host.module):
        value = loss(host, images, delta, hold, dual, crops)
        (gradient,) = torch.autograd.grad(value, delta)
    assert bool(gradient.isfinite().all())
    return float((gradient * direction).sum())


def true_slope(
    host: SoloHost, images: Tensor, direction: Tensor, hold: Hold, crops: int = 0
) -> float:
    """The central difference of fourth order; its step is long enough to leave rounding behind."""
    total = 0.0
    for steps, weight in ((1, 8), (-1, -8), (2, -1), (-2, 1)):
        hold.at = 0
        delta = (steps * STEP * direction).requires_grad_()
        with preserve_state(host.module):
            value = loss(host, images, delta, hold, crops=crops).detach()
        total += weight * float(value)
    return total / (12 * STEP)


@pytest.mark.parametrize("name", SERVED)
def test_the_gradient_is_the_true_one_and_the_host_is_left_alone(methods: Any, name: str) -> None:
    host = make(methods, name)
    assert bool(host.momentum_modules()) == (name in MOMENTUM)
    images, direction = torch.rand(BATCH, 3, SIDE, SIDE), torch.randn(BATCH, 3, SIDE, SIDE)
    before = {key: value.clone() for key, value in host.module.state_dict().items()}
    numbers = torch.get_rng_state()
    hold = Hold()
    gradients = slope(host, images, direction, True, hold)
    stock = slope(host, images, direction, False, Hold())
    true = true_slope(host, images, direction, hold)
    assert gradients != 0
    assert gradients == pytest.approx(true, rel=1e-5)
    if name in MOMENTUM:
        assert abs(stock - true) > 1e-3 * abs(true)
    after = host.module.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) for key in before)
    assert torch.equal(numbers, torch.get_rng_state())
    assert not {"base_training_step", "_shared_step_momentum", "log"} & vars(host.module).keys()


@pytest.mark.parametrize("name", SERVED)
def test_the_loss_is_the_ssl_loss_alone_and_no_label_leaks(methods: Any, name: str) -> None:
    host = make(methods, name)
    images = torch.rand(BATCH, 3, SIDE, SIDE)
    found = []
    for label in (0, 7, -1):  # -1 is solo-learn's unlabelled: its own class loss is NaN then
        torch.manual_seed(1)
        delta = torch.zeros_like(images, requires_grad=True)
        with preserve_state(host.module):
            with momentum_gradients(host.module, host.momentum_modules()):
                value = host.loss(views_of(host, images + delta), batch(label))
            found.append((value.detach(), torch.autograd.grad(value, delta)[0]))
    for value, gradient in found:
        assert torch.equal(value, found[0][0])
        assert torch.equal(gradient, found[0][1])
    with preserve_state(host.module):
        torch.manual_seed(1)
        whole = host.module.training_step(with_views(batch().sample, views_of(host, images)), 0)
    assert whole > found[0][0] + 0.1  # its own step adds the classifiers' cross-entropy


@pytest.mark.parametrize("name", SERVED)
def test_a_served_method_passes_what_it_is_watched_for(methods: Any, name: str) -> None:
    """Every path of its momentum branch is followed, and labels stay outside."""
    host = make(methods, name)
    names = host.momentum_names
    views = views_of(host, torch.rand(BATCH, 3, SIDE, SIDE))
    labels = torch.arange(BATCH) % 3
    rows = torch.arange(BATCH)
    given = batch()._replace(sample=[rows, None, labels])
    assert host.detect_momentum(views, given, labels)
    assert host.momentum_names == names


@pytest.mark.parametrize("name", ["swav", "simclr", "byol", "dino"])
def test_small_crops_have_a_gradient_too(methods: Any, name: str) -> None:
    host = make(methods, name, small_crops=2)
    images, direction = torch.rand(BATCH, 3, SIDE, SIDE), torch.randn(BATCH, 3, SIDE, SIDE)
    hold = Hold()
    gradients = slope(host, images, direction, True, hold, crops=2)
    assert gradients == pytest.approx(true_slope(host, images, direction, hold, 2), rel=1e-5)


def test_every_method_is_served_or_refused_with_a_reason(methods: Any) -> None:
    assert set(methods) == set(SERVED) | set(NOT_SERVED)


def test_the_readme_lists_what_is_served_and_refused() -> None:
    listed = f"<!-- solo-methods:begin -->\n{solo_methods()}\n<!-- solo-methods:end -->"
    assert listed in EXAMPLES.read_text(), "run python -m tests.bench.readme"


def test_a_method_that_is_not_served_says_why(methods: Any) -> None:
    host = make(methods, "supcon")
    images = torch.rand(BATCH, 3, SIDE, SIDE)
    with pytest.raises(UserError, match=r"method=supcon: its loss compares labels"):
        host.loss(views_of(host, images), batch())


def test_the_online_backbone_is_what_is_evaluated(methods: Any) -> None:
    host = make(methods, "byol")
    features = host.encode(torch.rand(2, 3, SIDE, SIDE))
    assert features.shape == (2, host.module.features_dim) == (2, 16)


def test_a_supervised_term_of_ones_own_is_refused(methods: Any) -> None:
    """A method of somebody's own may add a cross-entropy to the loss that it returns."""
    host = make(methods, "simclr")
    module = host.module
    own = type(module).training_step

    class Supervised(type(module)):  # type: ignore[misc]
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            features = self.backbone(batch[1][0])[:, :3]
            term = torch.nn.functional.cross_entropy(features, batch[2])
            return own(self, batch, batch_idx) + term

    module.__class__ = Supervised
    given = batch()._replace(sample=[torch.arange(BATCH), None, torch.arange(BATCH) % 3])
    with pytest.raises(UserError, match="depends on the labels of its batch"):
        host.detect_momentum(views_of(host, torch.rand(BATCH, 3, SIDE, SIDE)), given)
