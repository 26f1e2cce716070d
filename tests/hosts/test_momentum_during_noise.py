"""`momentum_during_noise`: whether queue and EMA go on in a noise phase, on real MoCo."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lightly.transforms.multi_view_transform import MultiViewTransform
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset
from torchvision import transforms

from cp_plugin import PoisonLoop
from cp_plugin.apps.hydra_app import compose
from cp_plugin.attack.loop import Attack, Rows
from cp_plugin.attack.perturbation import Perturbation
from cp_plugin.config.settings import CraftConfig, UserError
from cp_plugin.data import Photos
from cp_plugin.data.batch import Batch
from cp_plugin.engine.methods import build_method
from cp_plugin.engine.run import check
from cp_plugin.hosts import adapt
from cp_plugin.mirror import mirror
from tests.support.solo_modules import make

pytestmark = pytest.mark.filterwarnings("ignore")  # of Lightning's and of solo-learn's imports
BATCH, SIDE, PGD, NOISE = 8, 16, 2, 3
STEPS = PGD * NOISE
VIEW = transforms.Compose([transforms.RandomResizedCrop(SIDE, (0.3, 1.0)), transforms.ToTensor()])
Queue = Callable[[], tuple[Tensor, int]]


def collated(rows: list[Any]) -> Any:
    return [torch.stack(part) for part in zip(*rows, strict=True)], torch.zeros(len(rows))


def embedded() -> tuple[Any, Queue, float]:
    small = ("backbone.kwargs.channels=[8,8,8,8]", "method_kwargs.queue_size=64")
    cfg = check(compose("mocov2plus", ["momentum.final_tau=0.99", *small]))[1]
    torch.manual_seed(0)
    module = build_method(cfg, SIDE)
    views = torch.rand(BATCH, 3, SIDE, SIDE)
    loader = DataLoader(TensorDataset(views, views.flip(-1)), BATCH, collate_fn=collated)
    Trainer(max_epochs=1, accelerator="cpu", logger=False, enable_checkpointing=False,
            enable_progress_bar=False, enable_model_summary=False).fit(module, loader)  # fmt: skip
    host = adapt(module, lambda sample, views: (list(views), *sample[1:]))
    bank: Any = module.criterion.memory_bank  # type: ignore[union-attr]
    return host, lambda: (bank.bank, int(bank.bank_ptr)), 0.99


def of_solo_learn(solo_learn: Path, patch: pytest.MonkeyPatch) -> tuple[Any, Queue, float]:
    patch.syspath_prepend(solo_learn)
    patch.setenv("WANDB_MODE", "disabled")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        methods = pytest.importorskip("solo.methods").METHODS

    host = make(methods, "mocov2plus")
    module: Any = host.module.float()
    return (
        host,
        lambda: (module.queue, int(module.queue_ptr)),
        float(module.momentum_updater.cur_tau),
    )


@pytest.fixture(params=["embedded", "solo-learn"])
def moco(request: Any, monkeypatch: pytest.MonkeyPatch) -> tuple[Any, Queue, float]:
    if request.param == "embedded":
        return embedded()
    return of_solo_learn(request.getfixturevalue("solo_learn"), monkeypatch)


def noise_phase(host: Any, setting: str | None) -> Attack:
    """Run a noise phase of `NOISE` batches and `PGD` steps on each."""
    named = {} if setting is None else {"momentum_during_noise": setting}
    config = CraftConfig(noise_steps=NOISE, pgd_steps=PGD, **named)  # type: ignore[arg-type]
    images = torch.randint(0, 256, (BATCH, 3, 20, 20), dtype=torch.uint8)
    rows = torch.arange(BATCH)
    start = torch.Generator().manual_seed(0)
    delta = Perturbation.uniform(BATCH, (3, 20, 20), config.eps, "float32", start)
    attack = Attack(host, mirror([VIEW, VIEW]), delta, Rows.of_samples(rows >= 0), config, seed=0)
    batch = Batch(rows, rows + 1, images, [rows, None, torch.zeros(BATCH, dtype=torch.long)])
    sample = (None, torch.zeros(BATCH)) if type(host).__name__ == "LightningHost" else batch.sample
    assert len(list(attack.noise_phase([batch._replace(sample=sample)] * NOISE, 0))) == NOISE
    return attack


def pairs(host: Any) -> list[tuple[Tensor, Tensor]]:
    """Online and momentum weights."""
    module = host.module
    names = [("backbone", "backbone_momentum"), ("projection_head", "projection_head_momentum")]
    networks = [(getattr(module, one), getattr(module, other)) for one, other in names
                if hasattr(module, other)] or module.momentum_pairs  # fmt: skip
    return [pair for one, other in networks
            for pair in zip(one.parameters(), other.parameters(), strict=True)]  # fmt: skip


@pytest.mark.parametrize("setting", [None, "frozen"])
def test_frozen_is_the_default_and_leaves_no_trace(moco: Any, setting: str | None) -> None:
    host, _, _ = moco
    before = copy.deepcopy(host.module.state_dict())
    noise_phase(host, setting)
    after = host.module.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_running_pushes_keys_and_moves_the_branch(moco: Any) -> None:
    """Every noise step: a batch of keys, an EMA step; all else is as it was."""
    host, queue, tau = moco
    keys, pointer = queue()
    keys = keys.clone()
    before = copy.deepcopy(host.module.state_dict())
    expected = [other.detach().clone() for _, other in pairs(host)]
    for _ in range(STEPS):
        expected = [tau * old + (1 - tau) * one.detach()
                    for old, (one, _) in zip(expected, pairs(host), strict=True)]  # fmt: skip
    noise_phase(host, "running")
    new_keys, new_pointer = queue()
    size = new_keys.shape[-1] if new_keys.ndim == 3 else len(new_keys)
    assert (new_pointer - pointer) % size == STEPS * BATCH % size
    changed = (new_keys != keys).any(-2 if new_keys.ndim == 3 else -1)
    assert int(changed.sum()) == min(STEPS * BATCH, size) * (2 if new_keys.ndim == 3 else 1)
    assert not new_keys.requires_grad
    for (_, mine), theirs in zip(pairs(host), expected, strict=True):
        torch.testing.assert_close(mine.detach(), theirs, rtol=1e-4, atol=1e-6)
    momentum = {id(other) for _, other in pairs(host)}
    running = {name for name, weight in host.module.named_parameters() if id(weight) in momentum}
    after = host.module.state_dict()
    same = [name for name in before if name not in running and "queue" not in name
            and "bank" not in name]  # fmt: skip
    assert all(torch.equal(before[name], after[name]) for name in same)


def test_the_noise_differs(moco: Any) -> None:
    host, _, _ = moco
    twin = copy.deepcopy(host)
    twin.module._trainer = getattr(host.module, "_trainer", None)
    torch.manual_seed(0)
    frozen = noise_phase(twin, "frozen").perturbation.stored
    torch.manual_seed(0)
    running = noise_phase(host, "running").perturbation.stored
    assert not torch.equal(frozen, running)


class NothingMoves(LightningModule):
    """Its momentum branch is moved by a hook that no noise phase calls."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone = nn.Sequential(nn.Flatten(), nn.Linear(3 * SIDE * SIDE, 8))
        self.backbone_momentum = copy.deepcopy(self.backbone).requires_grad_(False)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x0, x1 = batch[0]
        with torch.no_grad():
            key = self.backbone_momentum(x1)
        return -(self.backbone(x0) * key).sum(1).mean()


def test_a_branch_that_nothing_moves_is_refused() -> None:
    host = adapt(NothingMoves(), lambda sample, views: (list(views), *sample[1:]))
    with pytest.raises(UserError, match=r"found nothing that moves .* or set .*=frozen"):
        noise_phase(host, "running")


def test_unknown_values_are_refused() -> None:
    with pytest.raises(UserError, match="momentum_during_noise must be one of frozen, running"):
        CraftConfig(momentum_during_noise="off")  # type: ignore[arg-type]


def test_a_loop_of_ones_own_lets_them_run_too() -> None:
    """EMA and queue of a plain loop are in its body: what a noise step does to them stays."""
    found = {}
    for setting in ("frozen", "running"):
        torch.manual_seed(0)
        network = nn.Sequential(nn.Flatten(), nn.Linear(3 * SIDE * SIDE, 8))
        model = nn.ModuleDict({"online": network, "online_momentum": copy.deepcopy(network)})
        model["online_momentum"].requires_grad_(False)
        model.register_buffer("queue", torch.randn(64, 8))
        data = DataLoader(
            Photos(train=True, patches=2, transform=MultiViewTransform([VIEW, VIEW])), BATCH
        )
        optimizer = torch.optim.SGD(model["online"].parameters(), lr=0.1)
        loop = PoisonLoop(data, model, rounds=1, model_steps=1, noise_steps=1, pgd_steps=1,
                          momentum_during_noise=setting)  # fmt: skip
        for step, batch in enumerate(loop):
            x0, x1 = batch[0]
            with torch.no_grad():
                for one, other in zip(*(part.parameters() for part in model.values()), strict=True):
                    other.mul_(0.9).add_(one, alpha=0.1)
                key = model["online_momentum"](x1)
            before = {name: value.clone() for name, value in model.state_dict().items()}
            logits = model["online"](x0) @ torch.cat([key, model.queue.clone()]).T
            loss = nn.functional.cross_entropy(logits, torch.arange(len(x0)))
            with torch.no_grad():
                model.queue[:BATCH] = key.detach()
            loop.backward(loss)
            optimizer.step()
            optimizer.zero_grad()
            assert step < 50
        found[setting] = (
            before,
            {name: value.clone() for name, value in model.state_dict().items()},
        )
    assert torch.equal(
        found["frozen"][0]["online.1.weight"], found["running"][0]["online.1.weight"]
    )
    assert not torch.equal(found["frozen"][1]["queue"], found["running"][1]["queue"])
