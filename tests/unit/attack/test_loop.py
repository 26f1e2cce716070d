"""The attack moves delta down the host's own loss, and nothing else."""

import copy

import pytest
import torch
from torch import nn
from torchvision import transforms

from cp_plugin.attack.loop import Attack, Schedule, poisoned
from cp_plugin.attack.perturbation import Perturbation
from cp_plugin.attack.rows import Rows
from cp_plugin.config.settings import CraftConfig
from cp_plugin.data.batch import Batch
from cp_plugin.hosts.protocol import Host
from cp_plugin.mirror import mirror

EPS = 8 / 255
PIPELINE = transforms.Compose(
    [
        transforms.RandomResizedCrop(16, scale=(0.5, 1)),
        transforms.RandomHorizontalFlip(),
        transforms.ToTensor(),
        transforms.Normalize([0.5] * 3, [0.25] * 3),
    ]
)


class TwoCrops:
    """Two views by one pipeline, as Lightly's MultiViewTransform holds them."""

    def __new__(cls):
        from lightly.transforms.multi_view_transform import MultiViewTransform

        return MultiViewTransform([PIPELINE, PIPELINE])


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(3, 8, 3, stride=2), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten()
        )
        self.head = nn.LazyLinear(8)
        self.calls = 0
        self(torch.zeros(2, 3, 16, 16))

    def forward(self, x):
        return self.head(self.layers(x))


class PlainHost(Host):
    """The smallest host: the distance of two views' features."""

    framework, method = "test", "distance"

    def __init__(self):
        torch.manual_seed(0)
        self.module = Net()

    def loss(self, views, batch):
        self.module.calls += 1
        first, second = (self.module(view) for view in views)
        return (first - second).square().mean()

    def momentum_modules(self):
        return ()

    def encode(self, images):
        return self.module(images)


def batch_of(rows, keys=None):
    generator = torch.Generator().manual_seed(3)
    images = torch.randint(0, 256, (8, 3, 16, 16), dtype=torch.uint8, generator=generator)
    rows = torch.tensor(rows)
    keys = rows + 100 if keys is None else torch.tensor(keys)
    return Batch(rows, keys, images[rows], sample=None)


def attack_on(granularity="sample", count=8, **settings):
    config = CraftConfig(granularity=granularity, pgd_steps=3, **settings)
    perturbation = Perturbation.zeros(count, (3, 16, 16), EPS)
    everything = torch.ones(8, dtype=torch.bool)
    labels = torch.tensor([0, 1, 2, 0, 1, 2, -1, 0])
    rows = Rows.of_samples(everything)
    if granularity == "class":
        rows = Rows.of_classes(labels, everything)
    return Attack(PlainHost(), mirror(TwoCrops()), perturbation, rows, config, seed=1)


def test_the_host_of_the_tests_is_a_host():
    assert isinstance(PlainHost(), Host)


def test_the_noise_phase_lowers_the_loss_on_the_views_it_draws():
    attack = attack_on(step_size=0.3)
    batch = batch_of(range(8))
    losses = [float(next(iter(attack.noise_phase([batch], 0)))) for _ in range(12)]
    assert losses[-1] < 0.8 * losses[0]
    assert 0 < attack.perturbation.stored.abs().max() <= EPS


def test_only_the_rows_of_the_batch_move():
    attack = attack_on()
    list(attack.noise_phase([batch_of([1, 4])], 0))
    moved = attack.perturbation.stored.flatten(1).abs().sum(1) > 0
    assert moved.tolist() == [False, True, False, False, True, False, False, False]


def test_steps_shorter_than_a_level_move_rows_of_int8_and_are_the_same_again():
    def crafted(dtype):
        attack = attack_on(step_size=0.002, dtype=dtype)
        attack.perturbation = Perturbation.zeros(8, (3, 16, 16), EPS, dtype)
        attack.noise_phase([batch_of(range(8))] * 5, 0)
        return attack.perturbation.gather(torch.arange(8)) / EPS

    exact, found, again = crafted("float32"), crafted("int8"), crafted("int8")
    assert torch.equal(found, again)
    along = float((found * exact.sign()).mean())
    assert along == pytest.approx(float(exact.abs().mean()), rel=0.1)


def test_a_class_row_gets_the_sum_of_its_images_gradients():
    attack = attack_on("class", count=3)
    batch = batch_of([0, 3, 7, 6])
    list(attack.noise_phase([batch], 0))
    moved = attack.perturbation.stored.flatten(1).abs().sum(1) > 0
    assert moved.tolist() == [True, False, False]
    assert torch.equal(attack.rows.of_batch(batch), torch.tensor([0, 0, 0, -1]))


def test_the_gradient_is_that_of_the_hosts_loss():
    """One step from zero is minus the sign of a gradient taken without the attack."""
    attack = attack_on(step_size=0.5)
    attack.config = CraftConfig(pgd_steps=1, step_size=0.5)
    batch = batch_of(range(4))
    seen = {}
    loss_of = attack.host.loss

    def recorded(views, batch):
        seen["loss"] = loss_of(views, batch)
        (seen["gradient"],) = torch.autograd.grad(seen["loss"], seen["delta"], retain_graph=True)
        return seen["loss"]

    gather = attack.perturbation.gather

    def watched(*asked):
        return gather(*asked) if "delta" in seen else seen.setdefault("delta", gather(*asked))

    attack.host.loss = recorded
    attack.perturbation.gather = watched
    list(attack.noise_phase([batch], 0))
    expected = -0.5 * EPS * seen["gradient"].sign()
    assert seen["gradient"].abs().max() > 0
    assert torch.allclose(attack.perturbation.stored[:4], expected, atol=1e-7)


def test_a_noise_phase_leaves_the_host_as_it_was():
    attack = attack_on()
    module = attack.host.module
    module.train()
    before = copy.deepcopy(module.state_dict())
    random_before = torch.get_rng_state()
    list(attack.noise_phase([batch_of(range(8))] * 2, 0))
    assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())
    assert torch.equal(torch.get_rng_state(), random_before)
    assert module.training
    assert all(parameter.requires_grad for parameter in module.parameters())
    assert all(parameter.grad is None for parameter in module.parameters())


def test_the_same_seed_and_step_draw_the_same_views():
    first, second, other = attack_on(), attack_on(), attack_on()
    batch = batch_of(range(8))
    views = [attack.views(batch, step) for attack, step in ((first, 5), (second, 5), (other, 6))]
    assert torch.equal(views[0][0], views[1][0])
    assert not torch.equal(views[0][0], views[2][0])
    assert not torch.equal(views[0][0], views[0][1])


def test_views_of_the_model_phase_are_poisoned():
    attack = attack_on()
    batch = batch_of(range(8))
    clean = attack.views(batch, 0)[0]
    attack.perturbation.write(torch.arange(8), torch.full((8, 3, 16, 16), EPS))
    assert (attack.views(batch, 0)[0] - clean).mean() > 0.5 * EPS / 0.25


def test_identical_images_share_a_row():
    rows = Rows.of_samples(torch.ones(8, dtype=torch.bool))
    assert rows.of_batch(batch_of([5, 2], keys=[77, 88])).tolist() == [5, 2]
    assert rows.of_batch(batch_of([0, 5], keys=[77, 77])).tolist() == [5, 5]
    assert rows.keys.tolist() == [0, 0, 88, 0, 0, 77, 0, 0]
    again = Rows.of_samples(torch.ones(8, dtype=torch.bool))
    again.restore(rows.keys)
    assert again.of_batch(batch_of([3], keys=[77])).tolist() == [5]


def test_images_that_are_not_chosen_have_no_row():
    chosen = torch.tensor([True, False, True, False])
    rows = Rows.of_samples(chosen)
    assert rows.of_image.tolist() == [0, -1, 1, -1]
    assert len(rows.keys) == 2


def test_poisoned_images_stay_in_range():
    images = torch.tensor([0, 255], dtype=torch.uint8).view(2, 1, 1, 1).expand(2, 3, 4, 4)
    delta = torch.tensor([-EPS, EPS]).view(2, 1, 1, 1).expand(2, 3, 4, 4)
    result = poisoned(images, delta)
    assert (result.min(), result.max()) == (0, 1)


def test_a_schedule_asks_for_a_noise_phase_after_each_model_phase():
    schedule = Schedule(rounds=2, model_steps=3, noise_steps=4, pgd_steps=1)
    due = [schedule.model_step() for _ in range(6)]
    assert due == [False, False, True, False, False, True]
    assert schedule.finished
    assert schedule.total_steps == 6


def test_image_passes_of_the_papers_settings():
    """CP-C plus CP-S on CIFAR-10: 160 million passes, about 1,600 epochs of two views."""
    class_wise = Schedule(rounds=1000, model_steps=20, noise_steps=20, pgd_steps=1)
    sample_wise = Schedule(rounds=200, model_steps=97, noise_steps=97, pgd_steps=5)
    passes = class_wise.image_passes(512, 2) + sample_wise.image_passes(512, 2)
    assert passes == pytest.approx(160e6, rel=0.02)


def test_joint_moves_delta_by_the_backward_pass_of_the_model():
    alternate, joint = attack_on(), attack_on(schedule="joint")
    batch = batch_of([0, 1, 2, 2])
    before = joint.perturbation.gather(torch.arange(8)).clone()
    plain, views = alternate.views(batch, 7), joint.views(batch, 7)
    for one, other in zip(plain, views, strict=True):
        assert torch.equal(one, other)
    weights, stepped = [], []
    for attack, given, found in ((alternate, plain, weights), (joint, views, stepped)):
        attack.host.loss(given, batch).backward()
        found += [weight.grad for weight in attack.host.module.parameters()]
    # The surrogate trains as if delta stood still.
    for one, other in zip(weights, stepped, strict=True):
        assert torch.equal(one, other)
    delta = before[:3].clone().requires_grad_()
    images = poisoned(batch.images, delta[torch.tensor([0, 1, 2, 2])])
    loss = joint.host.loss(joint._mirrored(images, batch, "model", 7), batch)
    (gradient,) = torch.autograd.grad(loss, delta)
    expected = (before[:3] - 0.1 * EPS * gradient.sign()).clamp(-EPS, EPS)
    after = joint.perturbation.gather(torch.arange(8))
    assert joint.moved
    torch.testing.assert_close(after[:3], expected, atol=2e-4, rtol=0)  # rows are float16
    assert torch.equal(after[3:], before[3:])


def test_joint_has_no_noise_phase():
    schedule = Schedule(rounds=3, model_steps=2, noise_steps=0, pgd_steps=5)
    assert [schedule.model_step() for _ in range(6)] == [False] * 6
    assert schedule.finished
    assert schedule.image_passes(batch_size=10, views=2) == 120


def test_joint_refuses_a_momentum_branch():
    class WithMomentum(PlainHost):
        def momentum_modules(self):
            return (self.module.head,)

    config = CraftConfig(granularity="class", schedule="joint")
    attack = attack_on()
    parts = (attack.mirror, attack.perturbation, attack.rows)
    with pytest.raises(ValueError, match="dual_branch=false"):
        Attack(WithMomentum(), *parts, config, seed=0)
    Attack(WithMomentum(), *parts, CraftConfig(schedule="joint", dual_branch=False), seed=0)
