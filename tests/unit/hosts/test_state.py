"""A noise step leaves no trace: everything is compared bit for bit."""

from __future__ import annotations

import copy
import random
import types
from collections.abc import Callable
from typing import Any

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from lightly.loss import NTXentLoss
from lightly.models.utils import update_momentum
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from cp_plugin.hosts.gradients import momentum_gradients, preserve_state

SIDE, WIDTH, BATCH = 8, 8, 4


class Helper:
    """An object of the host's own, as schedules and updaters are."""

    def __init__(self) -> None:
        self.tau, self.history = 0.9, [0.5]
        self.matrix = np.zeros((2, 2))


class Busy(pl.LightningModule):
    """Its training_step changes everything that can be changed."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone = nn.Sequential(
            nn.Conv2d(3, WIDTH, 3), nn.BatchNorm2d(WIDTH), nn.ReLU(), nn.Dropout(0.3)
        )
        self.head = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(WIDTH, WIDTH))
        self.backbone_momentum = copy.deepcopy(self.backbone).requires_grad_(False)
        self.head_momentum = copy.deepcopy(self.head).requires_grad_(False)
        self.criterion = NTXentLoss(memory_bank_size=(12, WIDTH))
        self.register_buffer("queue", torch.zeros(WIDTH, 6))
        self.register_buffer("expanded", torch.zeros(1).expand(4))
        self.unseen = [nn.Linear(2, 2)]
        self.plain = torch.zeros(3)
        self.outputs: list[Any] = []
        self.nested = {"seen": {1: [2, 3]}, "tensor": torch.ones(2)}
        self.steps, self.tau, self.name = 0, 0.99, "busy"
        self.helper, self.generator = Helper(), np.random.default_rng(1)
        self.torch_generator = torch.Generator().manual_seed(5)

    def momentum_modules(self) -> list[nn.Module]:
        return [self.backbone_momentum, self.head_momentum]

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        update_momentum(self.backbone, self.backbone_momentum, m=0.9)
        for online, target in zip(
            self.head.parameters(), self.head_momentum.parameters(), strict=True
        ):
            target.data = 0.9 * target.data + 0.1 * online.data
        x = batch[0] + 0.01 * torch.randn_like(batch[0])
        query = self.head(self.backbone(x))
        key = self.head_momentum(self.backbone_momentum(x.flip(-1))).detach()
        loss = self.criterion(query, key)
        self._change_state(key)
        self.log("loss", loss, on_epoch=True)
        self.log_dict({"tau": self.tau})
        return loss

    def _change_state(self, key: Tensor) -> None:
        with torch.no_grad():
            self.queue = torch.cat([key.T, self.queue[:, :2]], dim=1)
            self.head[2].bias.data.add_(random.random() + float(np.random.rand()))
            self.unseen[0].weight.mul_(2)
            self.expanded[:1].add_(1)
            self.plain += 1
            self.nested["tensor"].mul_(3)
        self.outputs.append({"key": key})
        self.nested["seen"][1].append(4)
        self.nested["new"] = 1
        self.steps, self.tau, self.extra = self.steps + 1, self.tau * 0.9, "new"
        self.helper.tau, self.helper.matrix[0, 0] = 0.5, self.generator.random()
        self.helper.history.append(torch.rand(1, generator=self.torch_generator))
        self.backbone.eval()
        self.head.requires_grad_(False)
        for parameter in self.backbone.parameters():
            parameter.grad = None

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9)


def content(tensor: Tensor | None) -> bytes:
    return b"" if tensor is None else tensor.detach().numpy().tobytes()


def picture(host: Busy) -> dict[str, Any]:
    """Everything there is to see, as plain bytes and numbers."""

    modules = [*host.modules(), *host.unseen]
    parameters = [p for m in modules for p in m.parameters(recurse=False)]
    return {
        "places": [id(p) for p in parameters],
        "memory": [p.data_ptr() for p in parameters],
        "values": [content(p) for p in parameters],
        "flags": [p.requires_grad for p in parameters],
        "gradients": [(id(p.grad), content(p.grad)) for p in parameters],
        "buffers": [(name, id(b), b.data_ptr(), content(b)) for name, b in host.named_buffers()],
        "training": [m.training for m in modules],
        "plain": (id(host.plain), content(host.plain)),
        "outputs": list(host.outputs),
        "nested": repr(host.nested),
        "numbers": (host.steps, host.tau, hasattr(host, "extra"), sorted(vars(host))),
        "helper": (host.helper.tau, repr(host.helper.history), host.helper.matrix.tobytes()),
        "generators": (
            repr(host.generator.bit_generator.state),
            content(host.torch_generator.get_state()),
        ),
        "random": (
            random.getstate(),
            np.random.get_state()[1].tobytes(),
            content(torch.get_rng_state()),
        ),
    }


def differences(before: dict[str, Any], after: dict[str, Any]) -> list[str]:
    return [key for key in before if before[key] != after[key]]


@pytest.fixture
def host() -> Busy:
    torch.manual_seed(0)
    host = Busy().train()
    host.head[2].eval()
    host.backbone[0].weight.grad = torch.ones_like(host.backbone[0].weight)
    return host


@pytest.fixture
def images() -> Tensor:
    return torch.rand(BATCH, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(1))


def noise_step(host: Busy, images: Tensor, dual_branch: bool = True) -> Tensor:
    delta = torch.zeros_like(images, requires_grad=True)
    with momentum_gradients(host, host.momentum_modules() if dual_branch else []):
        loss = Busy.training_step(host, (images + delta,), 0)
    (gradient,) = torch.autograd.grad(loss, delta)
    return gradient


@pytest.mark.filterwarnings(r"ignore:You are trying to `self.log\(\)`:UserWarning")
def test_the_host_here_changes_everything(host: Busy, images: Tensor) -> None:
    """Else the tests below would prove nothing."""
    before = picture(host)
    noise_step(host, images, dual_branch=False)
    assert set(differences(before, picture(host))) == set(before) - {"places"}


@pytest.mark.parametrize("dual_branch", [True, False])
@pytest.mark.parametrize("mode", ["train", "eval"])
def test_no_trace(host: Busy, images: Tensor, mode: str, dual_branch: bool) -> None:
    before = picture(host)
    with preserve_state(host):
        host.train(mode == "train")
        for _ in range(2):
            noise_step(host, images, dual_branch)
    assert differences(before, picture(host)) == []


def test_restore_between_steps(host: Busy, images: Tensor) -> None:
    """Steps start from the same weights and attributes, but draw other numbers."""
    with preserve_state(host) as guard:
        host.eval()
        first = picture(host)
        gradients = []
        for _ in range(3):
            gradients.append(noise_step(host, images))
            guard.restore()
            assert differences(first, picture(host)) == ["random"]
        assert not torch.equal(gradients[0], gradients[1])
        torch.manual_seed(4)
        fixed = noise_step(host, images)
        guard.restore()
        torch.manual_seed(4)
        assert torch.equal(noise_step(host, images), fixed)


def test_no_trace_after_an_error(host: Busy, images: Tensor) -> None:
    before = picture(host)
    with pytest.raises(RuntimeError, match="channels"), preserve_state(host):
        noise_step(host, images[:, :2])
    assert differences(before, picture(host)) == []


def test_parameters_are_frozen_inside(host: Busy, images: Tensor) -> None:
    with preserve_state(host):
        assert not any(p.requires_grad for p in host.parameters())
        assert not any(p.requires_grad for p in host.unseen[0].parameters())
    with preserve_state(host, freeze=False):
        assert host.backbone[0].weight.requires_grad


class Training(pl.Callback):
    """Runs noise steps between the training steps."""

    def __init__(self, noise: Callable[[Busy, Tensor], Tensor] | None) -> None:
        self.noise, self.logged = noise, 0

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: Any, batch: Any, batch_idx: int
    ) -> None:
        if self.noise is not None:
            with preserve_state(pl_module) as guard:
                pl_module.eval()
                for _ in range(2):
                    self.noise(pl_module, batch[0])
                    pl_module.logger.log_metrics({"noise": 1.0})
                    guard.restore()


class Steady(Busy):
    """Like its parent, but trainable."""

    def _change_state(self, key: Tensor) -> None:
        self.queue = torch.cat([key.T, self.queue[:, :2]], dim=1)
        self.outputs.append(float(key.sum()))
        self.logger.log_metrics({"direct": 1.0})


class Recorder(pl.loggers.logger.DummyLogger):
    """Keeps what it is told."""

    def __init__(self) -> None:
        super().__init__()
        self.told: list[Any] = []

    def log_metrics(self, *args: Any, **kwargs: Any) -> None:
        self.told.append((repr(args), repr(kwargs)))


@pytest.mark.filterwarnings("ignore:.*does not have many workers:UserWarning")
# Lightning's own, with torch 2.15.
@pytest.mark.filterwarnings("ignore:`isinstance.treespec, LeafSpec.` is deprecated:FutureWarning")
def test_training_is_the_same_with_noise_steps_in_between(tmp_path: Any) -> None:
    """A whole run under Lightning, BN in train mode: weights, metrics, logs and optimiser equal."""
    results = []
    for noise in (None, noise_step_of_steady):
        pl.seed_everything(3, verbose=False)
        module, logger = Steady(), Recorder()
        trainer = pl.Trainer(
            max_epochs=2,
            accelerator="cpu",
            logger=logger,
            log_every_n_steps=1,
            callbacks=[Training(noise)],
            default_root_dir=tmp_path,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )
        data = TensorDataset(torch.rand(12, 3, SIDE, SIDE))
        trainer.fit(module, DataLoader(data, batch_size=BATCH, shuffle=True))
        momenta = [s["momentum_buffer"] for s in trainer.optimizers[0].state.values() if s]
        results.append(
            (
                [t.numpy().tobytes() for t in (*module.state_dict().values(), *momenta)],
                module.outputs,
                logger.told,
                {name: float(value) for name, value in trainer.callback_metrics.items()},
                torch.rand(3).tolist(),
            )
        )
    assert results[0] == results[1]
    assert results[0][2]


def noise_step_of_steady(host: Busy, images: Tensor) -> Tensor:
    return noise_step(host, images)


def test_a_module_that_keeps_a_view_with_a_graph_is_put_back() -> None:
    module = nn.Linear(2, 2)
    module.kept = module(torch.ones(3, 2)).view(-1)
    before = module.kept.detach().clone()
    with preserve_state(module) as guard:
        module.kept = module.kept * 2
        guard.restore()
    assert torch.equal(module.kept, before)


class Slotted:
    __slots__ = ("count",)

    def __init__(self):
        self.count = 0


class Elsewhere(nn.Module):
    """Keeps its state in plain objects of other packages, as hosts with a `utils/` do."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(2, 2)
        package = types.ModuleType("utils_of_a_user")
        exec("class Ema:\n    updates = 0\n", vars(package))
        self.ema = package.Ema()
        self.ema.weights = torch.zeros(2)
        self.ema.log = []
        self.settings = types.SimpleNamespace(queue=[], seen={"count": 0})
        self.counter = Slotted()
        self.update = self.ema.__dict__.update
        self.optimizer = torch.optim.SGD(self.linear.parameters(), lr=1.0)
        schedule = torch.optim.lr_scheduler.LambdaLR
        self.scheduler = schedule(self.optimizer, lambda step: 0.5**step)

    def step(self):
        self.ema.updates += 1
        self.ema.weights += 1
        self.ema.log.append(1)
        self.settings.queue.extend([1, 2])
        self.settings.seen["count"] += 1
        self.counter.count += 1
        self.optimizer.step()
        self.scheduler.step()

    def found(self):
        return (
            *(self.ema.updates, self.ema.weights.tolist(), self.ema.log, self.settings.queue),
            *(self.settings.seen, self.counter.count, self.scheduler.last_epoch),
            *(self.optimizer.param_groups[0]["lr"], self.scheduler.get_last_lr()),
        )


def test_state_of_other_packages_and_schedules_is_put_back():
    host = Elsewhere()
    before = copy.deepcopy(host.found())
    with preserve_state(host) as guard:
        for _ in range(3):
            host.step()
            assert host.found() != before
            guard.restore()
            assert host.found() == before
        host.step()
    assert host.found() == before


def test_schedules_of_a_trainer_are_put_back():
    host = Elsewhere()
    optimizer, scheduler = host.optimizer, host.scheduler
    del host.optimizer, host.scheduler
    config = types.SimpleNamespace(scheduler=scheduler)
    vars(host)["_trainer"] = types.SimpleNamespace(
        optimizers=[optimizer], lr_scheduler_configs=[config]
    )
    with preserve_state(host):
        optimizer.step()
        scheduler.step()
        assert optimizer.param_groups[0]["lr"] == 0.5
    assert (optimizer.param_groups[0]["lr"], scheduler.last_epoch) == (1.0, 0)
