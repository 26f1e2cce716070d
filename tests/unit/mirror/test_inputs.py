"""What a mirror takes and refuses; dtypes, layouts, randomness and memory."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import lightly.transforms as lightly
import pytest
import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile
from torchvision import transforms as v1
from torchvision.transforms import InterpolationMode as Mode

from cp_plugin.config.settings import UserError
from cp_plugin.mirror import mirror

NORMALIZE = v1.Normalize((0.49, 0.48, 0.44), (0.25, 0.24, 0.26))


PILLOWS_BLUR = lightly.GaussianBlur(prob=0.5, sigmas=(0.1, 2.0))
SMOOTH = v1.RandomApply([v1.GaussianBlur(3)])  # without levels, to which values are rounded


def simclr(size: int = 16, blur: object = PILLOWS_BLUR) -> v1.Compose:
    return v1.Compose(
        [
            v1.RandomResizedCrop(size, interpolation=Mode.BICUBIC),
            v1.RandomApply([v1.ColorJitter(0.8, 0.8, 0.8, 0.2)], p=0.8),
            v1.RandomGrayscale(0.2),
            blur,
            v1.RandomApply([v1.RandomSolarize(128, 1.0)], p=0.2),
            v1.RandomHorizontalFlip(),
            v1.ToTensor(),
            NORMALIZE,
        ]
    )


def images(count: int = 8, size: int = 16, channels: int = 3) -> Tensor:
    return torch.rand(count, channels, size, size, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(
    ("pipeline", "given", "text"),
    [
        (simclr(), images() * 255, r"RandomResizedCrop expected images in \[0, 1\], got pixels"),
        (simclr(), images() - 0.5, r"RandomResizedCrop expected images in \[0, 1\], got pixels"),
        (simclr(), torch.full((2, 3, 16, 16), torch.nan), "RandomResizedCrop .* got NaN"),
        (simclr(), images(channels=1), "ColorJitter expected images with 3 channels, got 1"),
        (NORMALIZE, images(channels=4), "Normalize expected images with 3 channels.*got 4"),
        (v1.RandomCrop(20), images(), "RandomCrop expected images of at least 20x20.*got 16x16"),
        (v1.CenterCrop(20), images(), "CenterCrop expected images of at least 20x20"),
        (v1.GaussianBlur(43), images(), "GaussianBlur expected images larger"),
        (simclr(), images()[0], r"\(B, C, H, W\)"),
        (simclr(), (images() * 255).byte(), "divide bytes by 255"),
        (v1.RandomApply([v1.CenterCrop(8)]), images(), "RandomApply expected operations that keep"),
        (v1.RandomOrder([v1.CenterCrop(8)]), images(), "RandomOrder expected operations that keep"),
        (v1.RandomChoice([v1.CenterCrop(8), v1.CenterCrop(9)]), images(), "one image size"),
    ],
)
def test_bad_images(pipeline: object, given: Tensor, text: str) -> None:
    with pytest.raises(UserError, match=text):
        mirror(pipeline)(given)


def test_parameters_of_another_batch() -> None:
    twin = mirror(simclr())
    params = twin.sample(images())
    with pytest.raises(UserError, match="8 images"):
        twin.apply(images(4), params)
    with pytest.raises(UserError, match="1 pipelines, got 2"):
        twin.apply(images(), params * 2)


@pytest.mark.parametrize("size", [8, 17, 512])
def test_sizes(size: int) -> None:
    (view,) = mirror(simclr(min(size, 64)))(images(2, size))
    assert view.shape == (2, 3, min(size, 64), min(size, 64))
    assert view.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_dtypes(dtype: torch.dtype) -> None:
    twin = mirror(simclr(blur=SMOOTH))
    exact = images().to(dtype)
    params = twin.sample(exact.double(), torch.Generator().manual_seed(1))
    (view,) = twin.apply(exact, params)
    assert view.dtype == dtype
    (reference,) = twin.apply(exact.double(), params)
    step = torch.finfo(dtype).eps
    # Pixels next to the threshold of solarisation may fall on either side of it.
    far = (view.double() - reference).abs() > 8 * max(step, 1e-6)
    assert far.double().mean() < 1e-3


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_bytes_of_a_blur_in_any_precision(dtype: torch.dtype) -> None:
    twin = mirror(lightly.GaussianBlur(prob=1.0, sigmas=(1.0, 1.0)))
    given = images().to(dtype)
    params = twin.sample(given, torch.Generator().manual_seed(1))
    (view,) = twin.apply(given, params)
    (reference,) = twin.apply(given.double(), params)
    assert view.dtype == dtype
    torch.testing.assert_close(view, reference.to(dtype))


def test_float64_is_float64_throughout() -> None:
    """Noise far below float32 survives."""
    twin = mirror(simclr(blur=SMOOTH))
    x = images().double()
    params = twin.sample(x, torch.Generator().manual_seed(2))
    moved = twin.apply(x * (1 - 1e-13), params)[0] - twin.apply(x, params)[0]
    assert 0 < moved.abs().median() < 1e-11


def test_autocast_changes_nothing() -> None:
    twin = mirror(simclr())
    params = twin.sample(images())
    (plain,) = twin.apply(images(), params)
    with torch.autocast("cpu", torch.bfloat16):
        (cast,) = twin.apply(images(), params)
    assert torch.equal(plain, cast)


def test_channels_last_is_kept() -> None:
    twin = mirror(simclr())
    params = twin.sample(images())
    (plain,) = twin.apply(images(), params)
    (last,) = twin.apply(images().contiguous(memory_format=torch.channels_last), params)
    assert last.is_contiguous(memory_format=torch.channels_last)
    assert plain.is_contiguous()
    torch.testing.assert_close(plain, last)


def test_draws_follow_the_generator_and_nothing_is_remembered() -> None:
    twin = mirror(simclr())
    before = copy.deepcopy(vars(twin))
    state = torch.get_rng_state()
    first = twin(images(), torch.Generator().manual_seed(5))[0]
    assert torch.equal(torch.get_rng_state(), state)
    again = twin(images(), torch.Generator().manual_seed(5))[0]
    other = twin(images(), torch.Generator().manual_seed(6))[0]
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert str(vars(twin)) == str(before)
    torch.manual_seed(1)
    default = twin(images())[0]
    torch.manual_seed(1)
    assert torch.equal(default, twin(images())[0])


def test_images_of_a_batch_differ_and_stay_apart() -> None:
    twin = mirror(simclr())
    same = images(1).expand(8, 3, 16, 16)
    (view,) = twin(same)
    assert len(view.flatten(1).unique(dim=0)) == 8
    x = images().requires_grad_()
    (view,) = twin(x)
    (grad,) = torch.autograd.grad(view[3].sum(), x)
    assert grad[3].abs().sum() > 0
    assert grad[[0, 1, 2, 4, 5, 6, 7]].abs().sum() == 0


def test_input_is_not_written() -> None:
    x = images()
    before = x.clone()
    mirror(simclr())(x)
    assert torch.equal(x, before)


def test_a_model_that_holds_a_mirror() -> None:
    """nn.Module.apply and pickling go through; there are no parameters or buffers."""
    twin = mirror(simclr())
    seen: list[str] = []
    nn.Sequential(nn.Linear(2, 2), twin).apply(lambda module: seen.append(type(module).__name__))
    assert seen == ["Linear", "Mirror", "Sequential"]
    assert not list(twin.state_dict())
    clone = pickle.loads(pickle.dumps(twin))
    params = twin.sample(images())
    assert torch.equal(clone.apply(images(), params)[0], twin.apply(images(), params)[0])
    assert "ColorJitter(exact)" in repr(twin)


def peak(events: Any) -> int:
    """Highest number of bytes held at once, from the profiler's allocations."""
    held = highest = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        if event.name() == "[memory]":
            held += event.nbytes()
            highest = max(highest, held)
    return highest


def test_memory_of_the_backward_pass() -> None:
    """Views, their gradients, the images' gradient and all that is kept: 8 times the batch."""
    twin = mirror([simclr(32), simclr(32)])
    x = images(256, 32).requires_grad_()
    twin(x)
    params = twin.sample(x)
    ups = [torch.ones(256, 3, 32, 32) for _ in range(2)]
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        views = twin.apply(x, params)
        torch.autograd.grad(views, x, ups)
    result = recorded.profiler.kineto_results
    assert peak(result.events()) <= 8 * x.numel() * x.element_size()
