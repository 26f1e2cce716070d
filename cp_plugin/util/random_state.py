"""Random generators put back where they were, so that looking at data changes no draw of a run."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor


class RandomState:
    """Random state of Python, numpy, the CPU and the devices in use."""

    def __init__(self, devices: Iterable[torch.device] = ()) -> None:
        self._python = random.getstate()
        self._numpy = np.random.get_state()
        self._cpu = torch.get_rng_state()
        self._devices: list[tuple[Any, tuple[torch.device, ...], Tensor]] = []
        for device in devices:
            backend: Any = getattr(torch, device.type, None)
            if hasattr(backend, "get_rng_state"):
                where = () if device.type == "mps" else (device,)
                self._devices.append((backend, where, backend.get_rng_state(*where)))

    def was_drawn_from(self) -> bool:
        """Whether a generator of Python, of numpy or of the CPU has moved on."""
        kind, keys, *rest = np.random.get_state()
        kind_before, keys_before, *rest_before = self._numpy
        return (
            random.getstate() != self._python
            or (kind, *rest) != (kind_before, *rest_before)
            or not np.array_equal(keys, keys_before)
            or not torch.equal(torch.get_rng_state(), self._cpu)
        )

    def restore(self) -> None:
        """Put every generator back."""
        random.setstate(self._python)
        np.random.set_state(self._numpy)
        torch.set_rng_state(self._cpu)
        for backend, where, state in self._devices:
            backend.set_rng_state(state, *where)


@contextmanager
def random_state_kept() -> Iterator[None]:
    """Leave the random state of Python, numpy and the CPU as it is found; also a decorator."""
    state = RandomState()
    try:
        yield
    finally:
        state.restore()


def generator_state(value: Any) -> Callable[[], None] | None:
    """Return what puts an object's state back, None where it is no random generator."""
    if isinstance(value, torch.Generator):
        tensor = value.get_state()
        return lambda: _discard(value.set_state(tensor))
    if isinstance(value, np.random.Generator):
        bits, state = value.bit_generator, value.bit_generator.state
        return lambda: setattr(bits, "state", state)
    if isinstance(value, np.random.RandomState):
        legacy = value.get_state()
        return lambda: value.set_state(legacy)
    if isinstance(value, random.Random):
        python = value.getstate()
        return lambda: value.setstate(python)
    return None


def _discard(_: object) -> None:
    """Return nothing, whatever a call returned."""
