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

from cp_plugin.config import UserError
from cp_plugin.release import check_release, release

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
    """Sinkhorn-like: the teacher's outputs are normalised in place, into a fresh tensor by halves."""

    @torch.no_grad()
    def forward_momentum(self, x: Tensor) -> Tensor:
        q = torch.exp(super().forward_momentum(x))
        q /= q.sum(dim=0, keepdim=True)
        q.div_(q.sum(dim=1, keepdim=True))
        z = torch.empty_like(q)
        z[: BATCH // 2] = q[: BATCH // 2]
        z[BATCH // 2 :] = q[BATCH // 2 :]
        return z


HOSTS = [MoCo, ShuffledMoCo, BYOL, NoGradBYOL, DINO, InPlaceTargets]


class Steps:
    """The loss of a host as a function of delta alone: every call starts from the same state."""

    def __init__(self, host: Any, label: int = 0) -> None:
        self.host = host
        self.state = copy.deepcopy(host.state_dict())
        self.bank = copy.deepcopy(dict(host.named_buffers()))
        self.images = torch.rand(BATCH, 3, SIDE, SIDE)
        self.labels = torch.full((BATCH,), label)
        self.direction = torch.randn_like(self.images)

    def loss(self, delta: Tensor) -> Tensor:
        torch.manual_seed(3)
        with torch.no_grad():
            self.host.load_state_dict(self.state)
            for name, buffer in self.host.named_buffers():
                buffer.copy_(self.bank[name])
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
        released = release(self.host, momentum)
        with released:
            loss = self.loss(delta)
        check_release(released, loss, delta)
        return torch.autograd.grad(loss, delta)[0]

    def along(self, gradient: Tensor) -> float:
        return float((gradient * self.direction).sum())


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("make", HOSTS, ids=lambda make: make.__name__)
def test_released_gradient_is_the_true_one(make: Callable[[], Any], training: bool) -> None:
    steps = Steps(make().train(training))
    true, stock = steps.slope(), steps.along(steps.gradient())
    released = steps.along(steps.gradient(steps.host.momentum_modules()))
    assert released == pytest.approx(true, rel=1e-5)
    assert abs(stock - true) > 0.01 * abs(true)
    assert all(buffer.grad_fn is None for buffer in steps.host.buffers())


def test_error_when_the_branch_is_cut() -> None:
    host = BYOL()
    host.forward_momentum = lambda x: BYOL.forward_momentum(host, x.data)
    steps = Steps(host)
    with pytest.raises(UserError, match=r"the branch runs, but is cut off"):
        steps.gradient(host.momentum_modules())
