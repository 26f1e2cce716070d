"""Plain PyTorch loops: a poison crafted by the loop's own body, and one added to a data set."""

import copy
import difflib
import json
import runpy
from pathlib import Path

import numpy as np
import pytest
import torch
from lightly.loss import NTXentLoss
from lightly.transforms.simclr_transform import SimCLRTransform
from torch import nn
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

from cp_plugin import Poison, PoisonLoop, poisoned
from cp_plugin.attack.perturbation import Perturbation
from cp_plugin.config.settings import UserError
from cp_plugin.data import Photos, RawDataset
from tests.support.lightly_modules import backbone, head

EXAMPLES = Path(__file__).parents[1] / "examples"


class Encoder(nn.Module):
    """A network, with a momentum branch where it is asked for one."""

    def __init__(self, momentum: bool = False) -> None:
        super().__init__()
        self.net = nn.Sequential(backbone(), nn.Flatten(), head())
        if momentum:
            self.slow = copy.deepcopy(self.net)

    def forward(self, x):
        return self.net(x)


@pytest.fixture
def loader():
    torch.manual_seed(0)
    data = Photos(train=True, patches=2, transform=SimCLRTransform(input_size=32, gaussian_blur=0))
    return DataLoader(data, batch_size=8, shuffle=True)


def train(poison, model, criterion, epochs=1, key=None):
    """The body of a loop, used for both phases; returns what it saw."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    seen = []
    for _ in range(epochs):
        for batch in poison:
            x0, x1 = batch[0]
            loss = criterion(model(x0), (key or model)(x1))
            poison.backward(loss)
            optimizer.step()
            optimizer.zero_grad()
            seen.append((poison.model_phase, model.training, float(loss.detach())))
    return seen


@pytest.mark.parametrize("name", ["simclr", "moco", "byol"])
def test_an_example_differs_from_its_clean_loop_by_at_most_five_lines(name):
    clean = (EXAMPLES / f"{name}.py").read_text().splitlines()
    crafting = (EXAMPLES / f"{name}_poisoned.py").read_text().splitlines()
    lines = list(difflib.ndiff(clean, crafting))
    assert 0 < sum(line.startswith("+ ") for line in lines) <= 5
    assert sum(line.startswith("- ") for line in lines) <= 5


@pytest.mark.parametrize("name", ["simclr", "moco", "byol"])
def test_an_example_runs(name, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    runpy.run_path(str(EXAMPLES / f"{name}.py"))
    torch.manual_seed(0)
    after = runpy.run_path(str(EXAMPLES / f"{name}_poisoned.py"))
    assert capsys.readouterr().out.count("epoch: 01") == 2
    found = Poison.load("poison.safetensors")
    assert len(found.perturbation) == len(after["dataset"])
    assert found.perturbation.stored.abs().sum() > 0
    names = after["poison"]._host.momentum_names
    momentum = ("model.backbone_momentum", "model.projection_head_momentum")
    assert names == (() if name == "simclr" else momentum)


def test_the_body_serves_both_phases(loader):
    model, criterion = Encoder(), NTXentLoss()
    poison = PoisonLoop(
        loader, model, criterion, rounds=3, model_steps=1, noise_steps=2, pgd_steps=2
    )
    start = poison.poison().perturbation.stored.clone()
    seen = train(poison, model, criterion)
    # The first noise phase looks at the branches once and at the labels twice, the last one at the
    # labels again.
    assert [phase for phase, _, _ in seen] == [
        *([True] + 3 * [False] + 4 * [False]),
        *([True] + 4 * [False]),
        *([True] + 2 * [False] + 4 * [False]),
    ]
    assert all(phase == training for phase, training, _ in seen)
    assert poison.finished
    assert len(poison.losses) == 3
    moved = (poison.poison().perturbation.stored - start).abs()
    assert 0 < moved.max() <= 12 * 0.1 * 8 / 255 + 1e-3


def test_a_noise_phase_leaves_the_loop_as_it_was(loader):
    """Weights, statistics, memory bank and optimizer are those of the model steps alone."""
    states = []
    for noise_steps in (1, 4):
        torch.manual_seed(0)
        model, criterion = Encoder(), NTXentLoss(memory_bank_size=(32, 8))
        settings = {"model_steps": 1, "step_size": 1e-30, "seed": 3}
        poison = PoisonLoop(loader, model, criterion, noise_steps=noise_steps, **settings)
        torch.manual_seed(1)
        train(poison, model, criterion)
        states.append({**model.state_dict(), "bank": criterion.memory_bank.bank})
        assert model.training
        assert all(parameter.requires_grad for parameter in model.parameters())
    for name, value in states[0].items():
        assert torch.equal(value, states[1][name]), name


@pytest.mark.parametrize("how", ["plain", "scaled", "by the scaler", "in two parts"])
def test_the_backward_pass_may_be_scaled_or_in_parts(loader, how):
    """Every way moves delta as the plain call does; the loss is reported as it was given."""
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    own, found = torch.Tensor.backward, {}
    for way in ("plain", how):
        torch.manual_seed(0)
        model = Encoder()
        poison = PoisonLoop(loader, model, rounds=1, model_steps=1, noise_steps=3, seed=3)
        start = poison.poison().perturbation.stored.clone()
        for (x0, x1), _ in poison:
            distance = (model(x0) - model(x1)).square()
            if way == "plain":
                poison.backward(distance.mean())
            elif way == "scaled":
                poison.backward(scaler.scale(distance.mean()))
            elif way == "by the scaler":
                poison.backward(distance.mean(), lambda loss: scaler.scale(loss).backward())
            else:
                half = len(distance) // 2
                poison.backward(distance[:half].mean() / 2, retain_graph=True)
                poison.backward(distance[half:].mean() / 2)
            assert torch.Tensor.backward is own
            model.zero_grad()
        moved = (poison.poison().perturbation.stored - start).sign()
        assert moved.abs().mean() > 0.5
        found[way] = (moved, poison.losses[0])
    assert (found["plain"][0] == found[how][0]).float().mean() > 0.999
    factor = 2.0**10 if how == "scaled" else 1
    assert found[how][1] == pytest.approx(factor * found["plain"][1], rel=1e-4)


def test_the_momentum_branch_of_a_loop_is_released(loader):
    """One step moves delta otherwise with the dual branch than without it."""
    signs = {}
    for dual in (True, False):
        torch.manual_seed(0)
        model, criterion = Encoder(momentum=True), NTXentLoss()
        for parameter in model.slow.parameters():
            parameter.data += 0.3 * torch.randn_like(parameter)
        poison = PoisonLoop(loader, model, rounds=1, noise_steps=3, seed=3, dual_branch=dual)

        @torch.no_grad()
        def key(x, model=model):
            return model.slow(x)

        train(poison, model, criterion, key=key)
        assert poison._host.momentum_names == ("slow",)
        signs[dual] = poison.poison().perturbation.stored.sign()
    assert (signs[True] != signs[False]).float().mean() > 0.05


def test_a_joint_schedule_moves_delta_by_the_bodys_own_backward(loader):
    model, criterion = Encoder(), NTXentLoss()
    settings = {"init": "zero", "dtype": "float32", "schedule": "joint"}
    poison = PoisonLoop(loader, model, criterion, rounds=3, model_steps=2, **settings)
    weights = copy.deepcopy(model.state_dict())
    seen = train(poison, model, criterion, epochs=4)
    # The first batch is looked at in eval mode: for the branches once, for the labels twice.
    assert [phase for phase, _, _ in seen] == 3 * [False] + 6 * [True]
    assert all(phase == training for phase, training, _ in seen)
    assert poison.finished
    assert any(not torch.equal(value, weights[name]) for name, value in model.state_dict().items())
    found = poison.poison()
    schedule = json.loads(found.info["schedule"])
    assert (schedule["joint"], schedule["surrogate_steps_done"]) == (True, 6)
    assert found.info["host"] == "pytorch"
    # Two epochs of three batches: every image was in two of them.
    steps = found.perturbation.stored / (0.1 * 8 / 255)
    assert len(steps) == 24
    assert torch.allclose(steps, steps.round(), atol=1e-4)
    assert (steps.abs().amax((1, 2, 3)).round() == 2).all()


def test_a_joint_loop_refuses_what_it_cannot_serve(loader):
    model = Encoder(momentum=True)

    def key(x):
        return model.slow(x).detach()

    def joint(**settings):
        return PoisonLoop(loader, model, schedule="joint", rounds=1, model_steps=1, **settings)

    with pytest.raises(UserError, match=r"dual_branch=false"):
        train(joint(momentum_modules=["slow"]), model, NTXentLoss(), key=key)
    with pytest.raises(UserError, match=r"dual_branch=false"):
        train(joint(), model, NTXentLoss(), key=key)

    def run(poison, weight, cut):
        for (x0, x1), target in poison:
            views = [view.detach() if cut and poison.model_phase else view for view in (x0, x1)]
            loss = (weight(target) * (model(views[0]) - model(views[1]))).square().mean()
            poison.backward(loss)

    with pytest.raises(UserError, match=r"depends on the labels"):
        run(joint(dual_branch=False), lambda target: 1 + target.float().unsqueeze(1), cut=False)
    with pytest.raises(UserError, match=r"no gradient from the loss to the views: the body"):
        run(joint(dual_branch=False), lambda _: 1, cut=True)


def test_a_body_that_stops_leaves_nothing_behind(loader):
    model = Encoder(momentum=True)
    poison = PoisonLoop(loader, model, model_steps=1, noise_steps=2, rounds=1)
    for number, batch in enumerate(poison):
        difference = model(batch[0][0]) - model.slow(batch[0][1]).detach()
        poison.backward(difference.square().mean())
        if number == 5:
            break
    assert torch._C._len_torch_function_stack() == 0
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert "forward" not in vars(model.slow)


def test_a_loop_goes_on_from_its_state(loader):
    def make():
        torch.manual_seed(0)
        model, criterion = Encoder(), NTXentLoss()
        settings = {"rounds": 4, "model_steps": 1, "noise_steps": 1, "seed": 3}
        return PoisonLoop(loader, model, criterion, **settings), model, criterion

    first, model, criterion = make()
    for number, batch in enumerate(first):
        first.backward(criterion(model(batch[0][0]), model(batch[0][1])))
        if number == 6:
            break
    second, model, criterion = make()
    second.load_state_dict(first.state_dict())
    assert torch.equal(
        second.state_dict()["tensors"]["delta"], first.state_dict()["tensors"]["delta"]
    )
    assert second.state_dict()["steps_done"] == 1
    train(second, model, criterion)
    assert second.finished
    other = PoisonLoop(loader, model, criterion, granularity="class")
    with pytest.raises(UserError, match="the state holds delta of shape"):
        other.load_state_dict(first.state_dict())


def test_mistakes_are_told(loader):
    class Stream(IterableDataset):
        def __iter__(self):
            yield torch.zeros(3, 32, 32)

    model = Encoder()
    with pytest.raises(UserError, match="Stream has no attribute `transform`"):
        PoisonLoop(DataLoader(Stream()), model)
    with pytest.raises(UserError, match=r"expected a torch DataLoader first, got Photos"):
        PoisonLoop(loader.dataset, model)
    with pytest.raises(UserError, match=r"expected modules after the loader, got function"):
        PoisonLoop(loader, model, train)
    with pytest.raises(UserError, match=r"did you mean poison\.rounds"):
        PoisonLoop(loader, model, round=3)
    with pytest.raises(UserError, match=r"'slow', which is no network"):
        PoisonLoop(loader, model, momentum_modules=["slow"])
    poison = PoisonLoop(loader, model, model_steps=1)
    batches = iter(poison)
    next(batches)  # of the model phase
    with pytest.raises(UserError, match=r"call poison\.backward\(loss\) for every batch"):
        next(batches)
    poison = PoisonLoop(loader, model, model_steps=1)
    batches = iter(poison)
    (x0, x1), _ = next(batches)
    poison.backward((model(x0) - model(x1)).square().mean())
    next(batches)  # of the noise phase
    with pytest.raises(UserError, match=r"call poison\.backward\(loss\) for every batch"):
        next(batches)


def test_a_loss_that_uses_labels_is_refused(loader):
    model = Encoder()

    def train_supervised():
        poison = PoisonLoop(loader, model, model_steps=1)
        for (x0, x1), target in poison:
            weight = target.float().unsqueeze(1)
            poison.backward((weight * (model(x0) - model(x1)).square()).mean())

    with pytest.raises(UserError, match="depends on the labels"):
        train_supervised()


def test_poisoned_data_of_any_kind(tmp_path):
    """PIL, arrays and tensors get the same poisoned pixels, in any order."""
    data = Photos(train=True, patches=2)
    keys = torch.tensor([RawDataset(data, 32)[row].key for row in range(len(data))])
    delta = (torch.rand(len(data), 3, 32, 32) * 2 - 1) * 8 / 255
    poison = Poison(Perturbation(delta, 8 / 255), "sample", keys=keys)
    path = poison.save(tmp_path / "poison.safetensors")
    images = torch.from_numpy(data.data).permute(0, 3, 1, 2)
    expected = poison.apply(images, torch.arange(len(data)))
    tensors = poisoned(TensorDataset(images, torch.tensor(data.targets)), path)
    pictures = poisoned(data, path)
    for row in (5, 0, 11):
        picture, target = pictures[row]
        assert target == data.targets[row]
        assert np.array_equal(np.array(picture), expected[row].permute(1, 2, 0).numpy())
        assert torch.equal(tensors[row][0], expected[row])
    assert not torch.equal(tensors[5][0], images[5])
