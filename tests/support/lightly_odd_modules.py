"""More modules, in styles that are nobody's recommendation: `ODD` lists them."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from typing import Any

import torch
from lightly.loss import NegativeCosineSimilarity, NTXentLoss
from torch import Tensor, nn
from torch.nn import functional as F

from tests.support.lightly_modules import Style, backbone, base, head, online, with_momentum

ODD: list[Style] = []


def odd(**facts: Any) -> Callable[[Callable[[Any], Any]], Callable[[Any], Any]]:
    def register(build: Callable[[Any], Any]) -> Callable[[Any], Any]:
        ODD.append(Style(build.__name__, build, **facts))
        return build

    return register


def whole() -> nn.Sequential:
    return nn.Sequential(backbone(), nn.Flatten(), head())


class Helper:
    """A decorator that is no function of torch's."""

    def __init__(self, function: Callable[..., Any]) -> None:
        self.function = function

    def __get__(self, owner: Any, _: Any) -> Callable[..., Any]:
        @functools.wraps(self.function)
        def call(*args: Any) -> Any:
            with torch.no_grad():
                return self.function(owner, *args)

        return call


class Average:
    """A moving average that is no module."""

    def __init__(self, network: nn.Module) -> None:
        self.network = copy.deepcopy(network).eval()

    def follow(self, network: nn.Module) -> None:
        pairs = zip(self.network.parameters(), network.parameters(), strict=True)
        for slow, fast in pairs:
            slow.data = torch.lerp(slow.data, fast.data, 0.01)


@odd(momentum=("lagging",))
def projection_inside_the_backbone(root: Any) -> Any:
    """One network for all, a lerp in the step, a decorator of its own, a dictionary as result."""

    class Inside(base(root)):
        def __init__(self) -> None:
            super().__init__()
            self.body = whole()
            self.lagging = copy.deepcopy(self.body)

        @Helper
        def targets(self, x: Tensor) -> Tensor:
            return F.normalize(self.lagging(x), dim=1)

        def training_step(self, batch: Any, batch_idx: int) -> dict[str, Any]:
            x0, x1 = batch[0]
            with torch.no_grad():
                for a, b in zip(self.lagging.parameters(), self.body.parameters(), strict=True):
                    a.copy_(torch.lerp(a, b, 0.01))
            z = F.normalize(self.body(x0), dim=1)
            loss = (z - self.targets(x1)).square().sum(1).mean()
            return {"loss": loss, "log": {"z": z.detach()}, "note": "a string"}

    return Inside()


@odd(momentum=("parts.teacher",), batch="views, target")
def stacked_views(root: Any) -> Any:
    """All views in one tensor of five dimensions, student and teacher in a ModuleDict."""

    class Stacked(base(root)):
        def __init__(self) -> None:
            super().__init__()
            self.parts = nn.ModuleDict({"student": whole(), "teacher": whole()})
            self.parts["teacher"].requires_grad_(False)
            self.parts["teacher"].load_state_dict(self.parts["student"].state_dict())

        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            views = torch.stack(batch[0], dim=1)
            flat = views.flatten(0, 1)
            student = self.parts["student"](flat).unflatten(0, views.shape[:2])
            teacher = self.parts["teacher"](flat).unflatten(0, views.shape[:2]).detach()
            s0, s1 = (F.log_softmax(part, -1) for part in student.unbind(1))
            t0, t1 = (F.softmax(part / 0.5, -1) for part in teacher.unbind(1))
            return -((t0 * s1) + (t1 * s0)).sum(-1).mean()

    return Stacked()


@odd(momentum=("average.network",))
def average_in_an_object(root: Any) -> Any:
    """The copy hangs on an object that is no module; it moves after the optimizer's step."""

    class Hanging(online(root)):
        def __init__(self) -> None:
            super().__init__()
            self.predictor = head()
            self.body = nn.Sequential(self.backbone, nn.Flatten(), self.projection_head)
            self.average = Average(self.body)
            self.criterion = NegativeCosineSimilarity()

        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            x0, x1 = batch[0]
            with torch.no_grad():
                z0, z1 = self.average.network(torch.cat([x0, x1])).chunk(2)
            p0, p1 = self.predictor(self.body(torch.cat([x0, x1]))).chunk(2)
            return self.criterion(p0, z1) + self.criterion(p1, z0)

        def on_train_batch_end(self, *_: Any) -> None:
            self.average.follow(self.body)

    return Hanging()


@odd(momentum=("backbone_momentum", "projection_head_momentum"))
def copied_anew_in_every_step(root: Any) -> Any:
    """SMoG's reset, at every step: the momentum networks are new objects."""

    class Anew(with_momentum(root)):
        def __init__(self) -> None:
            super().__init__()
            self.criterion = NTXentLoss()

        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            self.backbone_momentum = copy.deepcopy(self.backbone)
            self.projection_head_momentum = copy.deepcopy(self.projection_head)
            self.backbone_momentum.requires_grad_(False)
            x0, x1 = batch[0]
            return self.criterion(self(x0), self.forward_momentum(x1))

    return Anew()


@odd(momentum=("teacher",))
def features_taken_inside_the_teacher(root: Any) -> Any:
    """A forward hook takes what the teacher's first part returns; the step detaches it."""

    class Taking(base(root)):
        def __init__(self) -> None:
            super().__init__()
            self.student, self.teacher = whole(), whole()
            self.teacher.requires_grad_(False)
            self.taken: list[Tensor] = []
            self.teacher[0].register_forward_hook(lambda _, __, out: self.taken.append(out))

        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            x0, x1 = batch[0]
            features = self.student[0](x0).flatten(1)
            with torch.no_grad():
                self.teacher(x1)
            deep = self.taken.pop().flatten(1).detach()
            z0 = self.student[2](features)
            return (features - deep).square().mean() + 0.1 * z0.square().mean()

    return Taking()


class InferenceTeacher:
    """Builds a module whose teacher's outputs no gradient can ever pass."""

    def __call__(self, root: Any) -> Any:
        class Cut(base(root)):
            def __init__(self) -> None:
                super().__init__()
                self.student, self.teacher = whole(), whole()
                self.teacher.requires_grad_(False)

            @torch.inference_mode()
            def targets(self, x: Tensor) -> Tensor:
                return self.teacher(x)

            def training_step(self, batch: Any, batch_idx: int) -> Tensor:
                x0, x1 = batch[0]
                return (self.student(x0) - self.targets(x1)).square().mean()

        return Cut()
