"""What a host is watched for: paths of its momentum branch, labels, and where its encoder is."""

from __future__ import annotations

import copy
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from cp_plugin.config.settings import UserError
from cp_plugin.data.batch import Batch
from cp_plugin.hosts.gradients import momentum_gradients
from cp_plugin.hosts.lightning import LightningHost

COUNT = 6
VIEWS = [torch.rand(COUNT, 3, generator=torch.Generator().manual_seed(n)) for n in (1, 2)]
LABELS = torch.tensor([0, 1, 2, 0, 1, 2])
BATCH = Batch(torch.arange(COUNT), torch.arange(COUNT), torch.zeros(COUNT, 1), ["views", LABELS])


class Scaled(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x * 2

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient * 2


class Stopped(torch.autograd.Function):
    """Lets no gradient through, though a graph leads through it."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return torch.zeros_like(gradient)


class Network(nn.Module):
    inside = ""
    """How the way through it is cut."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 4))
        self.offset = nn.Parameter(torch.rand(4))

    def forward(self, x: Tensor) -> Any:
        if self.inside == "data":
            return self.layers(x.data)
        if self.inside == "half":
            return 0.5 * (self.layers(x) + self.layers(x.data))
        if self.inside == "function":
            return Stopped.apply(self.layers(x))
        return self.layers(x) if self.inside != "constant" else (self.layers(x), self.offset)


class Method(nn.Module):
    """BYOL's form; `target` says how the momentum branch's output comes to the loss."""

    def __init__(self, target: str = "plain") -> None:
        super().__init__()
        torch.manual_seed(0)
        self.target = target
        self.teacher = Network()
        self.student = copy.deepcopy(self.teacher)
        for parameter in self.teacher.parameters():
            parameter.requires_grad_(False).mul_(1.3)
        self.weights = {name: value.detach().clone() for name, value in
                        self.teacher.named_parameters()}  # fmt: skip
        self.codes = nn.Parameter(torch.rand(5, 4))
        self.register_buffer("queue", torch.rand(9, 4))
        self.register_buffer("beside", self.teacher(VIEWS[1]) + 1e-5)

    @torch.no_grad()
    def key(self, x: Tensor) -> Tensor:
        if self.target == "functional_call":
            return functional_call(self.student, self.weights, (x,))
        if self.target == "checkpoint":
            return checkpoint(self.teacher, x, use_reentrant=True)
        if self.target == "vmap":
            return torch.vmap(self.teacher)(x)
        key = self.teacher(x)
        if self.target == "function":
            key = Scaled.apply(key)
        if self.target == "numpy":
            key = torch.from_numpy(key.numpy() * 1.0)
        return key

    def training_step(self, batch: Any) -> Tensor:
        x0, x1 = batch[0]
        query0, query1, key0 = self.student(x0), self.student(x1), self.key(x0)
        if self.target.startswith("inside one"):
            self.teacher.inside = self.target.rpartition(" ")[2]
        key1 = self.key(x1)
        self.teacher.inside = ""
        if self.target == "constant":
            self.teacher.inside = "constant"
            key1 = sum(self.key(x1))
            self.teacher.inside = ""
        if self.target == "one direction":
            key1 = key1.data
        if self.target == "picks":
            with torch.no_grad():
                key0, key1 = (self.queue[(key @ self.queue.T).argmax(1)] for key in (key0, key1))
        loss = (query0 - key1).square().mean() + (query1 - key0).square().mean()
        if self.target == "kink":  # as singular values have where images are nearly alike
            loss = loss + 3 * (key1 - self.beside).abs().mean()
        return loss


def host_of(module: nn.Module) -> LightningHost:
    return LightningHost(module, lambda sample, views: [list(views), *sample[1:]])


CUT = ["function", "checkpoint", "vmap", "numpy", "one direction"]


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")
@pytest.mark.parametrize("target", CUT)
def test_a_path_that_cannot_be_followed_is_refused_by_name(target: str) -> None:
    share = "only a part of the" if target == "one direction" else "no"
    says = f"uses what teacher returns, but {share} gradient reaches it.*dual_branch=false"
    with pytest.raises(UserError, match=says):
        host_of(Method(target)).detect_momentum(VIEWS, BATCH, LABELS)


INSIDE = {"inside one data": "no", "inside one half": "only a part of the"} | {
    "inside one function": "no"
}


@pytest.mark.parametrize("target", INSIDE)
def test_a_cut_inside_the_branch_in_one_of_two_directions_is_refused(target: str) -> None:
    says = f"teacher returns, but {INSIDE[target]} gradient passes its call 2.*dual_branch=false"
    with pytest.raises(UserError, match=says):
        host_of(Method(target)).detect_momentum(VIEWS, BATCH, LABELS)


def test_a_kink_of_the_loss_is_not_taken_for_a_cut() -> None:
    assert host_of(Method("kink")).detect_momentum(VIEWS, BATCH, LABELS)


@pytest.mark.parametrize("target", ["plain", "constant"])
def test_what_is_accepted_has_the_gradient_of_finite_differences(target: str) -> None:
    module = Method(target).double()
    views = [view.double() for view in VIEWS]
    host = host_of(module)
    assert host.detect_momentum(views, BATCH, LABELS)
    assert host.momentum_names == ("teacher",)
    leaves = [view.clone().requires_grad_() for view in views]
    with momentum_gradients(module, host.momentum_modules()):
        found = torch.autograd.grad(host.loss(leaves, BATCH), leaves)
    generator = torch.Generator().manual_seed(3)
    ways = [torch.randn(view.shape, generator=generator, dtype=torch.float64) for view in views]
    step = 1e-5
    with torch.no_grad():
        up, down = (
            float(host.loss([v + sign * step * w for v, w in zip(views, ways, strict=True)], BATCH))
            for sign in (1, -1)
        )
    slope = sum(float((g * w).sum()) for g, w in zip(found, ways, strict=True))
    assert slope == pytest.approx((up - down) / (2 * step), rel=1e-6)


def test_weights_kept_apart_are_refused() -> None:
    with pytest.raises(UserError, match=r"runs student on weights that are not its own"):
        host_of(Method("functional_call")).detect_momentum(VIEWS, BATCH, LABELS)


@pytest.mark.parametrize("target", [*CUT, "functional_call"])
@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")
def test_one_branch_alone_takes_them_all(target: str) -> None:
    host = host_of(Method(target))
    host.branch.dual = False
    assert host.detect_momentum(VIEWS, BATCH, LABELS)


@pytest.mark.parametrize(("target", "found"), [("plain", ("teacher",)), ("picks", ())])
def test_only_what_picks_integers_is_taken_for_no_branch(
    target: str, found: tuple[str, ...]
) -> None:
    host = host_of(Method(target))
    assert host.detect_momentum(VIEWS, BATCH, LABELS)
    assert host.momentum_names == found


class WithProbe(Method):
    """A classifier of the teacher's features that is a bare parameter, with a factor."""

    def __init__(self, detached: bool) -> None:
        super().__init__()
        self.detached = detached
        self.probe = nn.Parameter(torch.rand(3, 4))
        self.bias = nn.Parameter(torch.rand(3))

    def training_step(self, batch: Any) -> Tensor:
        features = self.key(batch[0][0]).detach()
        if not self.detached:
            features = self.student(batch[0][0])
        loss = F.cross_entropy(F.linear(F.normalize(features), self.probe, self.bias), batch[1])
        return super().training_step(batch) + 0.5 * loss


def test_a_probe_that_is_a_bare_parameter_is_harmless() -> None:
    module = WithProbe(detached=True)
    host = host_of(module)
    assert host.detect_momentum(VIEWS, BATCH, LABELS)
    before = module.probe.detach().clone()
    views = [view.clone().requires_grad_() for view in VIEWS]
    found = []
    for labels in (LABELS, LABELS.roll(1)):
        with momentum_gradients(module, host.momentum_modules()):
            loss = host.loss(views, BATCH._replace(sample=["views", labels]))
            found.append(torch.autograd.grad(loss, views))
    for first, second in zip(*found, strict=True):
        assert torch.equal(first, second)
    assert torch.equal(module.probe, before)
    plain = host_of(Method())
    plain.detect_momentum(VIEWS, BATCH, LABELS)
    with momentum_gradients(plain.module, plain.momentum_modules()):
        expected = torch.autograd.grad(plain.loss(views, BATCH), views)
    for first, second in zip(found[0], expected, strict=True):
        assert torch.allclose(first, second)


def test_a_bare_parameter_that_reads_the_online_network_is_refused() -> None:
    with pytest.raises(UserError, match="depends on the labels of its batch"):
        host_of(WithProbe(detached=False)).detect_momentum(VIEWS, BATCH, LABELS)


def test_the_encoder_is_the_online_one_whatever_comes_first() -> None:
    class Declared(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.teacher = nn.ModuleDict({"backbone": nn.Linear(2, 2)})
            self.student = nn.ModuleDict({"backbone": nn.Linear(2, 2)})

        def training_step(self, batch: Any) -> None:
            """Do nothing."""

    module = Declared()
    assert host_of(module).encoder() is module.student["backbone"]
    frozen = SimpleNamespace(first=nn.Linear(2, 2), backbone=nn.Linear(2, 2))
    pair = nn.Module()
    pair.old = nn.ModuleDict({"backbone": frozen.first.requires_grad_(False)})
    pair.new = nn.ModuleDict({"backbone": frozen.backbone})
    pair.training_step = lambda batch: None
    assert host_of(pair).encoder() is frozen.backbone
