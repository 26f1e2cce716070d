"""Resampling by the weights that are not zero against whole matrices, in double precision."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from cp_plugin.mirror.base import Operation, moved
from cp_plugin.mirror.base import Shape as BatchShape
from cp_plugin.mirror.blur import PillowBlur, TensorBlur
from cp_plugin.mirror.geometry import RandomCrop, RandomResizedCrop, Resize
from cp_plugin.mirror.resample import separable

banded = pytest.importorskip("cp_plugin.mirror.banded", reason="needs `pip install numba`")

SHAPE = BatchShape(6, 3, 21, 13)
FLIPPED = RandomResizedCrop((9, 16), (0.1, 1.0), (0.5, 2.0), "bicubic")
FLIPPED.flip_horizontal = FLIPPED.flip_vertical = 0.5
OPERATIONS = {
    "crop, bilinear": RandomResizedCrop((9, 16), (0.1, 1.0), (0.5, 2.0), "bilinear"),
    "crop, bicubic, flipped": FLIPPED,
    "resize down": Resize((5, 6), "lanczos"),
    "window beyond the border": RandomCrop((21, 13), (4, 4, 4, 4)),
    "torchvision's blur": TensorBlur((3, 5), (0.1, 2.0)),
}


@pytest.mark.parametrize("name", OPERATIONS)
def test_both_ways_agree(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    operation = OPERATIONS[name]
    generator = torch.Generator().manual_seed(5)
    # Beyond [0, 1], so that where the result is clamped it matters which pixels are.
    images = torch.rand(SHAPE, generator=generator) * 1.4 - 0.2
    params = operation.sample(SHAPE, generator)
    by = torch.randn(operation.output_shape(SHAPE), generator=generator)
    calls: list[int] = []
    forward = banded.forward
    monkeypatch.setattr(banded, "forward", lambda *given: calls.append(1) or forward(*given))
    out, grad = changed(operation, images, params, by)
    assert calls == [1], "single precision on the processor goes through Numba"
    expected, expected_grad = changed(operation, images.double(), params, by.double())
    assert calls == [1], "double precision does not"
    torch.testing.assert_close(out.double(), expected, rtol=0, atol=2e-6)
    torch.testing.assert_close(grad.double(), expected_grad, rtol=0, atol=2e-5)


def test_both_ways_of_pillows_blur_agree() -> None:
    operation, generator = PillowBlur((0.1, 2.0)), torch.Generator().manual_seed(5)
    images = torch.rand(SHAPE, generator=generator)
    params = operation.sample(SHAPE, generator)
    by = torch.randn(SHAPE, generator=generator)
    out, grad = changed(operation, images, params, by)
    expected, expected_grad = changed(operation, images.double(), params, by.double())
    torch.testing.assert_close(out.double(), expected, rtol=0, atol=1e-7)
    torch.testing.assert_close(grad.double(), expected_grad, rtol=0, atol=2e-5)


def changed(operation: Operation, images: Tensor, params: object, by: Tensor) -> tuple[Tensor, ...]:
    images = images.clone().requires_grad_()
    out = operation.apply(images, moved(params, images.device, images.dtype))
    return out.detach(), torch.autograd.grad(out, images, by)[0]


@pytest.mark.parametrize("threads", [1, 2, 5])
def test_matrices_that_images_share(threads: int) -> None:
    rows, columns = torch.rand(1, 4, 7), torch.rand(1, 3, 5)
    images = torch.rand(11, 2, 7, 5)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        out = separable(images, lambda: (rows, columns))
    finally:
        torch.set_num_threads(before)
    torch.testing.assert_close(out, rows[:, None] @ images @ columns[:, None].mT)


def test_an_empty_batch_and_weights_of_zero() -> None:
    zero = torch.zeros(1, 4, 7), torch.zeros(1, 3, 5)
    assert separable(torch.rand(0, 2, 7, 5), lambda: zero).shape == (0, 2, 4, 3)
    images = torch.rand(2, 2, 7, 5, requires_grad=True)
    out = separable(images, lambda: zero)
    (grad,) = torch.autograd.grad(out.sum(), images)
    assert not out.any()
    assert not grad.any()
