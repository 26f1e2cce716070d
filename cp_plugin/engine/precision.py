"""Which precision is fast on a processor: measured, since no list of instruction sets tells.

bf16 is served by every processor, but where its instructions are missing a convolution takes many
times as long as in float32.
"""

from __future__ import annotations

import os
import time
from contextlib import nullcontext

import torch
from torch import nn

SINGLE, BRAIN = "32", "bf16-mixed"
CHOSEN = "CP_PLUGIN_PROCESSOR_PRECISION"
"""Environment variable with what was found, so that all processes of a run take the same; a user
may set it."""
SECONDS = 1.0
GAIN = 1.25
"""bf16 has to be so many times as fast: what hardly differs is not decided by chance."""
CLEAR = 2.0
"""Where one takes so many times as long as the other there is nothing more to measure."""


def fast_on_processor() -> str:
    """Return the precision in which this processor trains convolutions fastest: `32` or bf16.

    It is measured once, for about a second, and kept for this process and those that it starts.
    """
    known = os.environ.get(CHOSEN)
    if known not in (SINGLE, BRAIN):
        known = BRAIN if _times_as_fast() >= GAIN else SINGLE
        os.environ[CHOSEN] = known
    return known


def _times_as_fast() -> float:
    """Return how many times as fast bf16 is as float32, by processor time.

    The fastest pass of each counts, since whatever else the machine does only makes one slower.
    """
    with torch.random.fork_rng(devices=[]):
        net = nn.Sequential(nn.Conv2d(32, 64, 3, padding=1), nn.ReLU(), nn.Conv2d(64, 64, 3))
    net = net.to(memory_format=torch.channels_last)
    images = torch.ones(16, 32, 16, 16).contiguous(memory_format=torch.channels_last)
    fastest = {SINGLE: float("inf"), BRAIN: float("inf")}
    begun = time.perf_counter()
    for turn in range(1000):
        for precision in fastest:
            start = time.process_time()
            _pass(net, images, precision)
            if turn:  # the first one compiles kernels
                fastest[precision] = min(fastest[precision], time.process_time() - start)
        ratio = fastest[SINGLE] / fastest[BRAIN] if turn else 1.0
        if ratio > CLEAR or ratio < 1 / CLEAR or (time.perf_counter() - begun > SECONDS and turn):
            break
    return ratio


def _pass(net: nn.Module, images: torch.Tensor, precision: str) -> None:
    cast = torch.autocast("cpu", torch.bfloat16) if precision == BRAIN else nullcontext()
    with torch.enable_grad(), cast:
        loss = net(images).float().square().mean()
    torch.autograd.grad(loss, list(net.parameters()))
