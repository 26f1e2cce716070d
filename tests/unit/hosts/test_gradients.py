"""Gradients through the momentum branch, checked by finite differences on real host code."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightly.loss import DINOLoss, NegativeCosineSimilarity, NTXentLoss
from lightly.models.utils import batch_shuffle, batch_unshuffle, update_momentum
from torch import Tensor, nn
from torch.nn import functional as F

from cp_plugin.config.settings import UserError
from cp_plugin.hosts.gradients import check_momentum_gradients, momentum_gradients

BATCH, SIDE, WIDTH = 6, 8, 8
STEP = 1e-5


@pytest.fixture(autouse=True)
def _double_precision() -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    torch.manual_seed(0)
    yield
    torch.set_default_dtype(before)


def smooth_backbone() -> nn.Sequential:
    """Small, and differentiable everywhere, so that finite differences are exact."""
    return nn.Sequential(
        nn.Conv2d(3, 6, 3, stride=2, padding=1),
        nn.BatchNorm2d(6),
        nn.GELU(),
        nn.Conv2d(6, WIDTH, 3, padding=1),
        nn.Tanh(),
        nn.AdaptiveAvgPool2d(1),
    )


def smooth_head(width: int = WIDTH) -> nn.Sequential:
    return nn.Sequential(
        nn.Linear(WIDTH, 12, bias=False), nn.BatchNorm1d(12), nn.GELU(), nn.Linear(12, width)
    )


class Twin(pl.LightningModule):
    """An online network and a momentum network that is not its copy any more."""

    momentum_names: tuple[str, ...] = ("backbone_momentum", "projection_head_momentum")

    def __init__(self) -> None:
        super().__init__()
        self.backbone = smooth_backbone()
        self.projection_head = smooth_head()
        self.backbone_momentum = copy.deepcopy(self.backbone)
        self.projection_head_momentum = copy.deepcopy(self.projection_head)
        for name in self.momentum_names:
            for parameter in getattr(self, name).parameters():
                parameter.data += 0.2 * torch.randn_like(parameter)
                parameter.requires_grad = False

    def forward(self, x: Tensor) -> Tensor:
        return self.projection_head(self.backbone(x).flatten(start_dim=1))

    def momentum_modules(self) -> list[nn.Module]:
        return [getattr(self, name) for name in self.momentum_names]


class MoCo(Twin):
    """Memory bank; the key is detached at the end."""

    def __init__(self) -> None:
        super().__init__()
        self.criterion = NTXentLoss(temperature=0.2, memory_bank_size=(24, WIDTH)).double()

    def forward_momentum(self, x: Tensor) -> Tensor:
        key = self.backbone_momentum(x).flatten(start_dim=1)
        return self.projection_head_momentum(key).detach()

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        update_momentum(self.backbone, self.backbone_momentum, m=0.99)
        update_momentum(self.projection_head, self.projection_head_momentum, m=0.99)
        x_query, x_key = batch[0]
        return self.criterion(self.forward(x_query), self.forward_momentum(x_key))


class ShuffledMoCo(MoCo):
    """The batch is shuffled before the key encoder and unshuffled behind it, without gradient."""

    @torch.no_grad()
    def forward_momentum(self, x: Tensor) -> Tensor:
        x, shuffle = batch_shuffle(x)
        key = self.backbone_momentum(x).flatten(start_dim=1)
        key = F.normalize(self.projection_head_momentum(key), dim=1)
        return batch_unshuffle(key, shuffle)


class BYOL(Twin):
    """Both views through both networks; the target is detached."""

    def __init__(self) -> None:
        super().__init__()
        self.prediction_head = smooth_head()
        self.criterion = NegativeCosineSimilarity()

    def forward_momentum(self, x: Tensor) -> Tensor:
        z = self.projection_head_momentum(self.backbone_momentum(x).flatten(start_dim=1))
        return z.detach()

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        update_momentum(self.backbone, self.backbone_momentum, m=0.99)
        update_momentum(self.projection_head, self.projection_head_momentum, m=0.99)
        x0, x1 = batch[0]
        p0, p1 = self.prediction_head(self.forward(x0)), self.prediction_head(self.forward(x1))
        z0, z1 = self.forward_momentum(x0), self.forward_momentum(x1)
        return 0.5 * (self.criterion(p0, z1) + self.criterion(p1, z0))


class NoGradBYOL(BYOL):
    """The teacher runs without gradient, as in Lightly's benchmarks; its input is changed first."""

    @torch.no_grad()
    def forward_momentum(self, x: Tensor) -> Tensor:
        x = x.to(memory_format=torch.channels_last) * 1.1
        z = self.projection_head_momentum(self.backbone_momentum(x).flatten(start_dim=1))
        return F.normalize(z, dim=1)


class DINO(pl.LightningModule):
    """Student and teacher; the loss centres what the teacher says in a no-grad buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.student_backbone, self.student_head = smooth_backbone(), smooth_head(10)
        self.teacher_backbone = copy.deepcopy(self.student_backbone)
        self.teacher_head = copy.deepcopy(self.student_head)
        for module in self.momentum_modules():
            for parameter in module.parameters():
                parameter.data += 0.2 * torch.randn_like(parameter)
                parameter.requires_grad = False
        self.criterion = DINOLoss(output_dim=10, teacher_temp=0.4, warmup_teacher_temp=0.4)

    def momentum_modules(self) -> list[nn.Module]:
        return [self.teacher_backbone, self.teacher_head]

    def forward(self, x: Tensor) -> Tensor:
        return self.student_head(self.student_backbone(x).flatten(start_dim=1))

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        update_momentum(self.student_backbone, self.teacher_backbone, m=0.99)
        update_momentum(self.student_head, self.teacher_head, m=0.99)
        with torch.no_grad():
            teacher = [
                self.teacher_head(self.teacher_backbone(view).flatten(start_dim=1))
                for view in batch[0]
            ]
        return self.criterion(teacher, [self.forward(view) for view in batch[0]], epoch=0)


class InPlaceTargets(NoGradBYOL):
    """Sinkhorn-like: the teacher's outputs are normalised in place, then put together."""

    @torch.no_grad()
    def forward_momentum(self, x: Tensor) -> Tensor:
        q = torch.exp(super().forward_momentum(x))
        q /= q.sum(dim=0, keepdim=True)
        q.div_(q.sum(dim=1, keepdim=True))
        z = torch.empty_like(q)
        z[: BATCH // 2] = q[: BATCH // 2]
        z[BATCH // 2 :] = q[BATCH // 2 :]
        return z


class LateUpdates(NoGradBYOL):
    """The momentum branch moves behind its forward pass, in every way that people write it."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = super().training_step(batch, batch_idx)
        update_momentum(self.backbone, self.backbone_momentum, m=0.9)
        pairs = zip(
            self.projection_head.parameters(),
            self.projection_head_momentum.parameters(),
            strict=True,
        )
        for online, target in pairs:
            target.data = 0.9 * target.data + 0.1 * online.data
            target.data.mul_(0.9).add_(0.1 * online.detach().data)
            with torch.no_grad():
                target.copy_(0.9 * target + 0.1 * online)
        self.backbone_momentum.load_state_dict(self.backbone.state_dict())
        return loss


HOSTS = [LateUpdates, MoCo, ShuffledMoCo, BYOL, NoGradBYOL, DINO, InPlaceTargets]


class Steps:
    """The loss of a host as a function of delta alone: every call starts from the same state."""

    def __init__(self, host: Any) -> None:
        self.host = host
        self.state = [tensor.detach().clone() for tensor in self.tensors()]
        self.images = torch.rand(BATCH, 3, SIDE, SIDE)
        self.labels = torch.zeros(BATCH, dtype=torch.int64)
        self.direction = torch.randn_like(self.images)

    def tensors(self) -> list[Tensor]:
        return [*self.host.parameters(), *self.host.buffers()]

    def loss(self, delta: Tensor) -> Tensor:
        torch.manual_seed(3)
        for tensor, value in zip(self.tensors(), self.state, strict=True):
            tensor.data.copy_(value)
        poisoned = self.images + delta
        views = [poisoned * 2 - 1, poisoned.flip(-1) * 1.5]
        loss: Tensor = self.host.training_step((views, self.labels, None), 0)
        return loss

    def slope(self) -> float:
        """The true derivative along one direction, by central differences."""
        with torch.no_grad():
            ahead = self.loss(STEP * self.direction)
            behind = self.loss(-STEP * self.direction)
        return float(ahead - behind) / (2 * STEP)

    def gradient(self, momentum: Sequence[nn.Module] = ()) -> Tensor:
        delta = torch.zeros_like(self.images, requires_grad=True)
        gradients = momentum_gradients(self.host, momentum)
        with gradients:
            loss = self.loss(delta)
        check_momentum_gradients(gradients, loss, delta)
        return torch.autograd.grad(loss, delta)[0]

    def along(self, gradient: Tensor) -> float:
        return float((gradient * self.direction).sum())


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("make", HOSTS, ids=lambda make: make.__name__)
def test_released_gradient_is_the_true_one(make: Callable[[], Any], training: bool) -> None:
    steps = Steps(make().train(training))
    true, stock = steps.slope(), steps.along(steps.gradient())
    gradients = steps.along(steps.gradient(steps.host.momentum_modules()))
    assert gradients == pytest.approx(true, rel=1e-5)
    assert abs(stock - true) > 0.01 * abs(true)
    assert all(buffer.grad_fn is None for buffer in steps.host.buffers())


class Stopped(NoGradBYOL):
    """Stop-gradients of the online branch, both kinds, beside the momentum branch's."""

    def __init__(self) -> None:
        super().__init__()
        self.held: dict[str, Tensor] = {}

    def hold(self, name: str, value: Tensor) -> Tensor:
        """Return the value of the first call: what a stop-gradient means to finite differences."""
        with torch.no_grad():
            return self.held.setdefault(name, value.clone())

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = super().training_step(batch, batch_idx)
        x0, x1 = batch[0]
        online = self.forward(x1)
        with torch.no_grad():
            codes = self.hold("codes", torch.softmax(self.forward(x1) * 2, dim=1))
            spread = self.hold("spread", (online - self.forward_momentum(x0)).square().mean())
        target = self.hold("target", online.detach())
        prediction = self.prediction_head(self.forward(x0))
        scale = 1 + self.forward_momentum(x1).square().mean()
        return (
            scale * loss
            + self.criterion(prediction, target)
            - (codes * prediction.log_softmax(dim=1)).sum(dim=1).mean()
            + 0 * spread
        )


@pytest.mark.parametrize("with_branch", [True, False])
def test_other_stop_gradients_stay(with_branch: bool) -> None:
    """Also with a momentum branch beside them; without one, nothing changes at all."""
    steps = Steps(Stopped())
    if with_branch:
        gradients = steps.along(steps.gradient(steps.host.momentum_modules()))
        assert gradients == pytest.approx(steps.slope(), rel=1e-5)
    else:
        steps.host.forward_momentum = lambda x: torch.ones(BATCH, WIDTH)
        gradients = steps.along(steps.gradient([]))
        assert gradients == pytest.approx(steps.slope(), rel=1e-5)


class Labelled(NoGradBYOL):
    """Online and momentum classifiers train along, as solo-learn's and Lightly's benchmarks do."""

    def __init__(self) -> None:
        super().__init__()
        self.classifier = nn.Linear(WIDTH, 3)
        self.momentum_classifier = nn.Sequential(nn.Linear(WIDTH, 3))
        self.teacher_probe = nn.Linear(WIDTH, 3)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        views, labels, _ = batch
        loss = super().training_step(batch, batch_idx)
        with torch.no_grad():
            teacher = self.backbone_momentum(views[0]).flatten(start_dim=1)
        for logits in (
            self.classifier(self.backbone(views[0]).flatten(start_dim=1).detach()),
            self.momentum_classifier[0](teacher),
            self.teacher_probe(teacher.detach()),
        ):
            loss = loss + F.cross_entropy(logits, labels)
        return loss


def test_labels_do_not_leak() -> None:
    steps = Steps(Labelled())
    gradients = []
    for label in (0, 2):
        steps.labels.fill_(label)
        gradients.append(steps.gradient(steps.host.momentum_modules()))
    assert gradients[0].abs().sum() > 0
    assert torch.equal(*gradients)


def test_labels_would_leak_without_the_names() -> None:
    """The test above can fail: told of no classifiers, the momentum ones do leak."""
    steps = Steps(host := Labelled())
    gradients = []
    for label in (0, 2):
        steps.labels.fill_(label)
        delta = torch.zeros_like(steps.images, requires_grad=True)
        with momentum_gradients(host, host.momentum_modules(), classifiers=[]):
            loss = steps.loss(delta)
        gradients += torch.autograd.grad(loss, delta)
    assert not torch.allclose(*gradients)


class Queues(MoCo):
    """Every way to write keys into state: registered or not, with and without gradient mode."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("queue", torch.zeros(2 * BATCH, WIDTH))
        self.register_buffer("rebound", torch.zeros(2 * BATCH, WIDTH))
        self.register_buffer("center", torch.zeros(WIDTH))
        self.plain = torch.zeros(BATCH, WIDTH)
        self.listed = [torch.zeros(BATCH, WIDTH)]

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        key = self.forward_momentum(batch[0][1])
        query = self.forward(batch[0][0])
        loss = self.criterion(query, key) + (query @ self.queue.clone().detach().T).square().mean()
        self.queue[:BATCH] = key
        self.plain.copy_(key)
        torch.add(key, 1, out=self.listed[0])
        with torch.no_grad():
            self.queue[BATCH:] = key
            self.rebound = torch.cat([key, self.rebound[:BATCH]])
            self.center = self.center * 0.9 + 0.1 * key.mean(dim=0)
            self.center.mul_(0.5).add_(key.mean(dim=0))
        return loss


def test_queues_hold_keys_but_no_graph() -> None:
    host = Queues()
    steps = Steps(host)
    steps.gradient()
    stock = [t.clone() for t in (*host.buffers(), host.plain, host.listed[0])]
    for _ in range(2):
        steps.gradient(host.momentum_modules())
        gradients = [*host.buffers(), host.plain, host.listed[0]]
        assert all(torch.equal(a, b) for a, b in zip(stock, gradients, strict=True))
        assert not any(tensor.requires_grad for tensor in gradients)


def test_hosts_may_read_values_and_flags() -> None:
    """Reading, copying, flags: what works on plain tensors works on those of the opened branch."""
    host = NoGradBYOL()

    def forward_momentum(x: Tensor) -> Tensor:
        z = NoGradBYOL.forward_momentum(host, x)
        z.requires_grad = False
        with torch.no_grad():
            seen = [z.numpy(), z.mean().item(), float(z.sum()), z.tolist(), copy.deepcopy(z)]
            seen.append(z.detach().cpu().numpy())
        assert not seen[4].requires_grad
        return z.requires_grad_(False)

    steps = Steps(host)
    expected = steps.gradient(host.momentum_modules())
    host.forward_momentum = forward_momentum
    assert torch.equal(steps.gradient(host.momentum_modules()), expected)


def test_an_error_in_the_host_leaves_nothing_behind() -> None:
    host = BYOL()
    before = [dict(vars(m)) for m in host.modules()]
    with pytest.raises(RuntimeError), momentum_gradients(host, host.momentum_modules()):
        host.backbone_momentum(torch.zeros(1, 7, 8, 8))
    assert [dict(vars(m)) for m in host.modules()] == before
    assert torch._C._len_torch_function_stack() == 0
    assert torch.is_grad_enabled()


# The compiler itself looks at .grad of its inputs.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
@pytest.mark.parametrize("how", ["wrapped", "in_place"])
def test_compiled_networks_compile_once(how: str) -> None:
    """Interception stays outside: the compiler sees each network as without a release."""
    compiled_graphs: list[int] = []

    def backend(graph: Any, inputs: Any) -> Any:
        compiled_graphs.append(len(inputs))
        return graph.forward

    torch._dynamo.reset()
    steps = Steps(NoGradBYOL().eval().requires_grad_(False))
    host = steps.host
    expected = steps.gradient(host.momentum_modules())
    for name in ("backbone", "backbone_momentum"):
        if how == "wrapped":
            setattr(host, name, torch.compile(getattr(host, name), backend=backend))
        else:
            getattr(host, name).compile(backend=backend)
    for _ in range(4):
        assert torch.allclose(steps.gradient(host.momentum_modules()), expected, rtol=1e-9)
    assert len(compiled_graphs) == 2


@pytest.mark.filterwarnings("ignore:CPU Autocast only supports:UserWarning")
def test_under_autocast() -> None:
    steps = Steps(NoGradBYOL().float().requires_grad_(False))
    steps.images, steps.direction = steps.images.float(), steps.direction.float()
    exact = steps.gradient(steps.host.momentum_modules())
    stock = steps.gradient()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        rounded = steps.gradient(steps.host.momentum_modules())
    error = (rounded - exact).norm() / exact.norm()
    assert error < 0.1 < (stock - exact).norm() / exact.norm()


def test_error_when_the_branch_is_cut() -> None:
    host = BYOL()
    host.forward_momentum = lambda x: BYOL.forward_momentum(host, x.data)
    with pytest.raises(UserError, match=r"the branch runs, but is cut off"):
        Steps(host).gradient(host.momentum_modules())


def test_a_branch_that_has_not_run_yet_is_named_once_and_looked_at_again(
    caplog: pytest.LogCaptureFixture,
) -> None:
    delta = torch.zeros(2, 4, requires_grad=True)
    online, target = nn.Linear(4, 3), nn.Linear(4, 3).requires_grad_(False)
    both = nn.ModuleList([online, target])
    gradients = momentum_gradients(both, [target])
    found = []
    for runs in (False, False, True):
        with gradients:
            loss = online(delta).square().mean()
            loss = loss + target(delta).detach().square().mean() if runs else loss
        found.append(check_momentum_gradients(gradients, loss, delta))
    assert found == [False, False, True]
    (message,) = caplog.messages
    assert "has not run yet" in message
    assert "poison.momentum_modules" in message


def test_error_when_nothing_reaches_delta() -> None:
    host = BYOL()
    host.training_step = lambda batch, _: host(batch[0][0].data).mean()
    with pytest.raises(UserError, match=r"expected a loss that depends on the views"):
        Steps(host).gradient()
