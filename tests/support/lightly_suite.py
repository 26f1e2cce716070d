"""The conformance suite of a Lightly-style module: what every adapter promises, for any module.

`Conformance(style, root)` builds a module, lets the adapter detect the momentum branch on one batch
and offers the loss as a function of delta; `check_*` are the promises. To try a module of your own,
make a `tests.support.lightly_modules.Style` of it.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any

import lightning.pytorch
import torch
from lightly.utils.benchmarking import OnlineLinearClassifier
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from cp_plugin.attack.loop import Attack
from cp_plugin.attack.perturbation import Perturbation
from cp_plugin.attack.rows import Rows
from cp_plugin.config.settings import CraftConfig
from cp_plugin.data.batch import Batch
from cp_plugin.hosts import adapt
from cp_plugin.hosts.gradients import check_momentum_gradients, momentum_gradients, preserve_state
from cp_plugin.hosts.modes import hold_still
from cp_plugin.hosts.stable_pretraining import is_spt
from tests.support.lightly_modules import CLASSES, Style

BATCH = 6
STEP = 1e-5


def sample_of(style: Style, views: Sequence[Tensor], labels: Tensor) -> Any:
    """Return a batch as the module's own loader would make it."""
    names = [f"{number}.png" for number in range(len(labels))]
    shapes = {
        "views, target, name": (list(views), labels, names),
        "views, target": [list(views), labels],
        "views": list(views),
        "dictionaries": {"views": [{"image": view, "label": labels} for view in views]},
        "crops": {
            f"{'global' if number < 2 else 'local'}_{number}": {"image": view, "label": labels}
            for number, view in enumerate(views)
        },
    }
    return shapes[style.batch]


class RecordedStops(TorchFunctionMode):
    """Records what stop-gradients outside the momentum branch let through, and puts it in again.

    While recording, a result that needs no gradient though it came by `detach` or in no-grad mode
    is a stop-gradient; one of the opened branch needs its gradient. On replay the recorded values
    stand in, so that finite differences see constants where autograd does.
    """

    def __init__(self) -> None:
        super().__init__()
        self.values: list[Any] = []
        self.recording = True
        self._next = 0

    def rewind(self) -> None:
        """Go back to the first one, to replay."""
        self.recording, self._next = False, 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = getattr(func, "__name__", "")
        first = args[0] if args else None
        stops = name == "detach" or not torch.is_grad_enabled()
        fixed = isinstance(first, torch.nn.Parameter) or name == "__get__"
        result = func(*args, **(kwargs or {}))
        target = first if name == "__setitem__" else result
        if not stops or fixed or not isinstance(target, Tensor):
            return result
        with torch._C.DisableTorchFunction(), torch.no_grad():
            if self.recording:
                self.values.append(None if target.requires_grad else target.clone())
                return result
            value = self.values[self._next]
            self._next += 1
            if value is None:
                return result
            if name == "__setitem__" or (name.endswith("_") and not name.endswith("__")):
                target.copy_(value)
                return result
            return value.clone()


class Conformance:
    """One module, one batch, and its loss as a function of delta."""

    def __init__(self, style: Style, root: Any = lightning.pytorch) -> None:
        torch.manual_seed(0)
        self.style = style
        self.module = style.build(root)
        if hasattr(self.module, "on_train_start") and not is_spt(self.module):  # needs a trainer
            self.module.on_train_start()
        self.labels = torch.arange(BATCH) % CLASSES
        self.images = torch.rand(BATCH, 3, 8, 8)
        self.direction = torch.randn_like(self.images)
        self.host = adapt(self.module, lambda labels, views: sample_of(style, views, labels))
        self.batch = Batch(
            torch.arange(BATCH), torch.arange(BATCH) + 1, torch.zeros(0), self.labels
        )
        self.classifiers = [
            part
            for name, part in self.module.named_modules()
            if isinstance(part, OnlineLinearClassifier) or name.startswith("classifier")
        ]
        self.host.detect_momentum(
            self.views(torch.zeros_like(self.images)), self.batch, self.labels
        )
        self.drift()

    def drift(self) -> None:
        """Move the momentum branch away from its twin, as training does."""
        torch.manual_seed(1)
        for module in self.host.momentum_modules():
            for parameter in module.parameters():
                parameter.data += 0.2 * torch.randn_like(parameter)

    def views(self, delta: Tensor) -> list[Tensor]:
        """Views by fixed, smooth augmentations."""
        poisoned = self.images + delta
        views = []
        for number, size in enumerate(self.style.sizes):
            view = poisoned.flip(-1) if number % 2 else poisoned
            view = F.interpolate(view, size=(size, size), mode="bilinear", align_corners=False)
            views.append(view * (2 - 0.3 * number) - 0.5)
        return views

    def loss(
        self, delta: Tensor, dual: bool = True, recorded: RecordedStops | None = None
    ) -> Tensor:
        """Return the loss, the module left as it was but for what the caller's context undoes."""
        torch.manual_seed(3)
        gradients = momentum_gradients(self.module, self.host.momentum_modules() if dual else ())
        with gradients, recorded or nullcontext():
            loss = self.host.loss(self.views(delta), self.batch)
        if delta.requires_grad:
            check_momentum_gradients(gradients, loss, delta)
        return loss

    def gradient(self, dual: bool = True, recorded: RecordedStops | None = None) -> Tensor:
        """Return the gradient of the loss with respect to delta at zero."""
        with preserve_state(self.module):
            hold_still(self.module)
            delta = torch.zeros_like(self.images, requires_grad=True)
            return torch.autograd.grad(self.loss(delta, dual, recorded), delta)[0]

    def slope(self, recorded: RecordedStops | None = None) -> float:
        """Return the derivative of the SSL loss along one direction by central differences.

        No branch is opened, and classifiers say the same to every image.
        """
        for classifier in self.classifiers:
            for parameter in classifier.parameters():
                parameter.data.zero_()
        values = []
        for step in (STEP, -STEP):
            if recorded is not None:
                recorded.rewind()
            with preserve_state(self.module):
                hold_still(self.module)
                dual = recorded is not None  # so that the recorded values come in the same order
                values.append(float(self.loss(step * self.direction, dual, recorded)))
        return (values[0] - values[1]) / (2 * STEP)


def check_gradient(case: Conformance) -> None:
    """The gradient is finite, not zero, and agrees with finite differences."""
    recorded = RecordedStops() if case.style.holds else None
    gradient = case.gradient(recorded=recorded)
    assert gradient.isfinite().all()
    assert gradient.abs().sum() > 0
    found, true = float((gradient * case.direction).sum()), case.slope(recorded)
    assert abs(found - true) <= 1e-5 * abs(true) + 1e-9, (found, true)


def check_momentum(case: Conformance) -> None:
    """The branch that is found is the true one, and the gradient goes through it."""
    assert sorted(case.host.momentum_names) == sorted(case.style.momentum)
    dual, stock = case.gradient(), case.gradient(dual=False)
    if case.style.momentum and case.style.cut:
        assert (dual - stock).norm() > 0.01 * stock.norm()
    elif not case.style.momentum:
        assert torch.equal(dual, stock)


def check_labels_stay_outside(case: Conformance) -> None:
    """The gradient is the same, bit for bit, whatever the labels are."""
    gradients = []
    for labels in (case.labels, case.labels.roll(1), torch.zeros_like(case.labels)):
        case.batch = case.batch._replace(sample=labels)
        gradients.append(case.gradient())
    assert torch.equal(gradients[0], gradients[1])
    assert torch.equal(gradients[0], gradients[2])


def check_untouched(case: Conformance) -> None:
    """A noise phase leaves parameters, buffers, attributes and random state as they were."""
    before = state_of(case.module)
    random_before = torch.get_rng_state()

    class Views(torch.nn.Module):
        def forward(
            self, images: Tensor, generator: torch.Generator, aspects: Tensor | None = None
        ) -> list[Tensor]:
            case.images = images.to(torch.get_default_dtype())
            return case.views(torch.zeros_like(case.images))

    batch = case.batch._replace(images=torch.randint(0, 256, (BATCH, 3, 8, 8), dtype=torch.uint8))
    random_before = torch.get_rng_state()
    perturbation = Perturbation.zeros(BATCH, (3, 8, 8), 8 / 255)
    rows = Rows.of_samples(torch.ones(BATCH, dtype=torch.bool))
    attack = Attack(case.host, Views(), perturbation, rows, CraftConfig(pgd_steps=2), seed=0)
    losses = list(attack.noise_phase([batch, batch], step=1))
    assert all(loss.isfinite() for loss in losses)
    assert perturbation.stored.abs().sum() > 0
    assert torch.equal(torch.get_rng_state(), random_before)
    after = state_of(case.module)
    assert before.keys() == after.keys()
    for name, value in before.items():
        same = (
            torch.equal(value, after[name]) if isinstance(value, Tensor) else value == after[name]
        )
        assert same, name


def state_of(module: Any) -> dict[str, Any]:
    """Return copies of all that a module holds, by name."""
    state: dict[str, Any] = {}
    todo: list[tuple[str, Any]] = [("", module)]
    while todo:
        prefix, value = todo.pop()
        if isinstance(value, torch.nn.Module):
            state |= {f"{prefix}{k}": v.detach().clone() for k, v in tensors_of(value)}
            state |= {f"{prefix}{k}.needs": v.requires_grad for k, v in tensors_of(value)}
            state[f"{prefix}training"] = value.training
            todo += [(f"{prefix}{k}.", v) for k, v in value.named_children()]
            plain = {k: v for k, v in vars(value).items() if not k.startswith("_")}
            todo += [(f"{prefix}{k}.", v) for k, v in plain.items() if isinstance(v, (list, dict))]
            state |= {
                f"{prefix}{k}": copy.copy(v)
                for k, v in plain.items()
                if isinstance(v, (int, float, str)) and not inspect.isroutine(v)
            }
        elif isinstance(value, (list, dict)):
            items = value.items() if isinstance(value, dict) else enumerate(value)
            state[f"{prefix}length"] = len(value)
            todo += [(f"{prefix}{k}.", v) for k, v in items]
        elif isinstance(value, Tensor):
            state[prefix] = value.detach().clone()
    return state


def tensors_of(module: torch.nn.Module) -> list[tuple[str, Tensor]]:
    """Return a module's own parameters and buffers by name."""
    own = [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]
    return [(name, tensor) for name, tensor in own if tensor is not None]
