"""The store keeps the budget, touches only the rows it is given, and adds up repeated ones."""

import pytest
import torch

from cp_plugin.attack.perturbation import Perturbation
from cp_plugin.config.settings import UserError

EPS = 8 / 255
SHAPE = (3, 4, 4)


def store(rows=6, dtype="float32", eps=EPS, file=None):
    generator = torch.Generator().manual_seed(0)
    return Perturbation.uniform(rows, SHAPE, eps, dtype, generator, file)


@pytest.mark.parametrize("dtype", ["float32", "float16", "int8"])
@pytest.mark.parametrize("eps", [8 / 255, 0.03, 1 / 255, 1 / 3])
def test_no_type_of_row_leaves_the_budget(dtype, eps):
    perturbation = store(400, dtype, eps)
    delta = perturbation.gather(torch.arange(400))
    assert delta.abs().max() <= eps
    assert delta.abs().max() > 0.97 * eps
    assert abs(delta.mean()) < 0.05 * eps
    perturbation.write(torch.arange(400), 10 * torch.randn(400, *SHAPE))
    assert perturbation.gather(torch.arange(400)).abs().max() <= eps


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [("float32", 0), ("float16", 2e-5), ("int8", 2e-4)]
)
def test_rows_read_as_they_were_written(dtype, tolerance):
    perturbation = store(dtype=dtype)
    before = perturbation.gather(torch.arange(6))
    delta = (torch.rand(2, *SHAPE) * 2 - 1) * EPS
    perturbation.write(torch.tensor([4, 1]), delta)
    assert (perturbation.gather(torch.tensor([4, 1])) - delta).abs().max() <= tolerance
    others = torch.tensor([0, 2, 3, 5])
    assert torch.equal(perturbation.gather(others), before[others])


def test_descend_steps_against_the_sign():
    perturbation = Perturbation.zeros(3, SHAPE, EPS)
    gradient = torch.randn(2, *SHAPE)
    perturbation.descend(torch.tensor([2, 0]), gradient, 0.1 * EPS)
    moved = perturbation.gather(torch.tensor([2, 0]))
    assert torch.allclose(moved, -0.1 * EPS * gradient.sign())
    assert perturbation.gather(torch.tensor([1])).abs().max() == 0


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_a_gradient_that_is_no_finite_number_moves_nothing(value):
    perturbation = Perturbation.zeros(1, SHAPE, EPS)
    perturbation.descend(torch.tensor([0]), torch.full((1, *SHAPE), value), EPS)
    assert perturbation.gather(torch.tensor([0])).abs().max() == 0


def test_negative_rows_read_as_zero_and_are_never_written():
    perturbation = store()
    before = perturbation.stored.clone()
    rows = torch.tensor([-1, 2])
    assert perturbation.gather(rows)[0].abs().max() == 0
    perturbation.descend(torch.tensor([-1]), torch.ones(1, *SHAPE), EPS)
    assert torch.equal(perturbation.stored, before)


def test_repeated_rows_add_their_gradients_before_the_sign():
    perturbation = Perturbation.zeros(2, SHAPE, EPS)
    rows = torch.tensor([1, 1, 0])
    unique, inverse = rows.unique(return_inverse=True)
    delta = perturbation.gather(unique).requires_grad_()
    weights = torch.tensor([3.0, -1.0, 2.0]).view(-1, 1, 1, 1)
    (gradient,) = torch.autograd.grad((delta[inverse] * weights).sum(), delta)
    perturbation.descend(unique, gradient, 0.5 * EPS)
    assert torch.allclose(perturbation.gather(rows), torch.full((3, *SHAPE), -0.5 * EPS))


def test_rows_in_a_file_behave_like_rows_in_memory(tmp_path):
    in_file, held = store(file=tmp_path / "rows"), store()
    for perturbation in (in_file, held):
        perturbation.descend(torch.tensor([3]), torch.ones(1, *SHAPE), 0.1)
    assert torch.equal(in_file.stored, held.stored)
    assert (tmp_path / "rows").stat().st_size == held.stored.numel() * 4


def test_rows_beyond_the_budget_are_refused():
    with pytest.raises(UserError, match=r"at most 0\.03137 a pixel, got 0\.10000"):
        Perturbation(torch.full((1, *SHAPE), 0.1), EPS)
    with pytest.raises(UserError, match="at most"):
        Perturbation(torch.full((1, *SHAPE), torch.nan), EPS)


def test_rows_go_where_they_are_wanted_and_stay_where_they_are_kept():
    # The device `meta` has no memory: whatever needed a value of it would fail.
    perturbation = store()
    perturbation.move(torch.device("meta"))
    rows = torch.tensor([-1, 4, 2])
    assert perturbation.gather(rows).device.type == "meta"
    perturbation.descend(rows, torch.ones(3, *SHAPE, device="meta"), 0.1)
    assert perturbation.stored.device.type == "meta"
    assert store().gather(rows, torch.device("meta")).device.type == "meta"
