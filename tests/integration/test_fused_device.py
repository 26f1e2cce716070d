"""The colour jitter that Triton compiles for a GPU, interpreted on the processor."""

import os
import subprocess
import sys

import pytest

pytest.importorskip("triton")
COMPARE = """
import torch
from cp_plugin.mirror import fused_device
from cp_plugin.mirror.base import ImageFormat, Shape
from cp_plugin.mirror.jitter import ColorJitter, _Jitter, like

for format in (ImageFormat.PILLOW, ImageFormat.FLOAT):
    for size in ((8, 8), (33, 40)):  # one block of pixels, two blocks
        around = (0.6, 1.4)
        jitter = ColorJitter(around, around, around, (-0.1, 0.1), 0.8, format)
        draw = torch.Generator().manual_seed(1)
        images = torch.rand(9, 3, *size, generator=draw)
        params = like(jitter.sample(Shape(*images.shape), draw), torch.float32)
        given = torch.rand(images.shape, generator=draw) - 0.5
        asked = images.clone().requires_grad_()
        wanted = _Jitter.apply(asked, params)
        (gradient,) = torch.autograd.grad(wanted, asked, given)
        plan = fused_device.as_plan(params)
        made, means = fused_device.forward(images, plan)
        torch.testing.assert_close(made, wanted, atol=1e-5, rtol=0)
        found = fused_device.backward(images, means, given, plan)
        torch.testing.assert_close(found, gradient, atol=1e-4, rtol=0)
"""


def test_it_makes_the_same_pixels_and_gradients():
    # Whether kernels are interpreted is settled when Triton is imported.
    done = subprocess.run(
        [sys.executable, "-c", COMPARE],
        env={**os.environ, "TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
