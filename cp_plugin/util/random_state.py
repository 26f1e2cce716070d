"""Random generators put back where they were, so that looking at data changes no draw of a run."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor


class RandomState:
    """Random state of Python, numpy, the CPU and the devices in use."""

    def __init__(self, devices: Iterable[torch.device] = ()) -> None:
        self._python: tuple[Any, ...] = random.getstate()
        self._numpy: Any = np.random.get_state()
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

    def plain(self) -> dict[str, Any]:
        """Return it as tensors, numbers and text alone, as a checkpoint may hold it."""
        kind, keys, *rest = self._numpy
        version, numbers, gauss = self._python
        return {
            "python": [version, list(numbers), gauss],
            "numpy": [str(kind), torch.from_numpy(np.asarray(keys).astype(np.int64)), *rest],
            "cpu": self._cpu,
            "devices": {str(where[0]): state for _, where, state in self._devices if where},
        }

    @classmethod
    def of(cls, plain: Mapping[str, Any]) -> RandomState:
        """Return what `plain` gave; devices that are not here are left out."""
        state = cls()
        version, numbers, gauss = plain["python"]
        kind, keys, *rest = plain["numpy"]
        state._python = (version, tuple(numbers), gauss)
        state._numpy = (kind, keys.numpy().astype(np.uint32), *rest)
        state._cpu = plain["cpu"]
        for name, value in plain["devices"].items():
            device = torch.device(name)
            backend: Any = getattr(torch, device.type)
            if backend.is_available() and (device.index or 0) < backend.device_count():
                state._devices.append((backend, (device,), value))
        return state

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
