"""Places where a data set may keep samples, copied so that nothing read through a copy stays in it.

A data set that caches what its transform returned does so in a container of its own, an array of
objects, or an object of the user's around these. What lies elsewhere (a global of a module, a class
attribute) is shared by every copy: it is found by looking whether anything has stayed.
"""

from __future__ import annotations

import copy
import gc
import sys
import weakref
from collections import deque
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np
from torch import nn
from torch.utils.data import Dataset

CONTAINERS = (dict, list, set, deque)
SMALL = 64
"""Containers of up to so many entries are searched for further ones: a cache may be by split."""
DEPTH = 4
"""Objects and containers within one another that are followed."""
_COPIED_STDLIB = frozenset({"types", "argparse", "collections", "__main__"})
_SHARED = (frozenset(sys.stdlib_module_names) - _COPIED_STDLIB) | frozenset(
    {"builtins", "torch", "torchvision", "numpy", "PIL", "lightly", "solo", "h5py", "lmdb"}
)
"""Packages whose objects are shared: files that are open, images, transforms."""


def unshared(value: Any, depth: int = DEPTH) -> Any:
    """Return a copy of what may keep samples: entries are the same, places for them are not.

    Arrays of numbers, images, transforms, data sets and open files are returned themselves.
    """
    if isinstance(value, np.ndarray):
        return value.copy() if value.dtype == object else value
    if isinstance(value, CONTAINERS):
        same: Any = copy.copy(value)
        if depth and len(value) <= SMALL and not isinstance(value, set):
            for place in list(value) if isinstance(value, dict) else range(len(value)):
                same[place] = unshared(same[place], depth - 1)
        return same
    if not depth or not _is_plain(value):
        return value
    held = {name: unshared(entry, depth - 1) for name, entry in vars(value).items()}
    if all(held[name] is entry for name, entry in vars(value).items()):
        return value
    other = SimpleNamespace() if type(value) is SimpleNamespace else object.__new__(type(value))
    vars(other).update(held)
    return other


def still_held(marks: Sequence[weakref.ref[Any]]) -> bool:
    """Tell whether objects that nobody should have any more are still there."""
    if any(mark() is not None for mark in marks):
        gc.collect()
    return any(mark() is not None for mark in marks)


def _is_plain(value: Any) -> bool:
    """Whether a value is an object of the user's that only holds others."""
    cls = type(value)
    if isinstance(value, (type, Dataset, nn.Module)) or callable(value):
        return False
    if cls.__module__.partition(".")[0] in _SHARED or hasattr(cls, "__del__"):
        return False
    made_plainly = getattr(cls, "__new__", None) in (object.__new__, SimpleNamespace.__new__)
    return hasattr(value, "__dict__") and made_plainly
