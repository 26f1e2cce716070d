"""Plain Python state that a training_step may change: taken once, put back in place.

Covers what hangs on modules as ordinary attributes: numbers, containers, arrays, generators,
objects of the host's own classes, and the random state that all of them may draw from.
"""

from __future__ import annotations

import functools
import operator
import sys
from collections import deque
from collections.abc import Callable
from types import MethodType, ModuleType
from typing import Any

import numpy as np
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau

from cp_plugin.util.internals import COMPILED_CALL, TRAINER_NAMES, trainer_of
from cp_plugin.util.random_state import generator_state

_KEPT_KEYS = frozenset(vars(nn.Module())) | frozenset(
    {"forward", COMPILED_CALL, "log", "log_dict", *TRAINER_NAMES}
)
_LEAVES = (int, float, complex, str, bytes, type(None), type, ModuleType)
_SEARCHED_STDLIB = frozenset({"types", "argparse", "collections", "queue", "__main__"})
_LOGGERS = frozenset({"wandb", "tensorboard", "tensorboardX", "mlflow", "comet_ml", "neptune"})
"""What they have written stays written, so what they remember of it stays too."""
FRAMEWORKS = frozenset({"builtins", "torch", "lightning", "pytorch_lightning", "omegaconf"})
_NOT_SEARCHED = (
    (frozenset(sys.stdlib_module_names) - _SEARCHED_STDLIB)
    | FRAMEWORKS
    | _LOGGERS
    | {"numpy", "torchvision", "torchaudio", "PIL", "hydra"}
)
_LARGEST_SEARCHED = 4096


class Attributes:
    """Plain Python state of the modules, and of what hangs on them."""

    def __init__(self, module: nn.Module) -> None:
        self.modules: list[nn.Module] = []
        """Every module of the host, with those that it keeps in lists or plain objects."""
        self.tensors: list[Tensor] = []
        """Tensors that are neither parameters nor buffers."""
        self._restores: list[Callable[[], object]] = []
        self._seen: set[int] = set()
        self._own = {_package(m) for m in module.modules()} - FRAMEWORKS
        for child in module.modules():
            self._visit(child)
        for trainer in {id(t): t for t in map(trainer_of, module.modules())}.values():
            self._visit_trainer(trainer)

    def restore(self) -> None:
        """Put every attribute back."""
        for restore in self._restores:
            restore()

    def _visit(self, value: Any) -> None:
        if isinstance(value, _LEAVES) or id(value) in self._seen:
            return
        self._seen.add(id(value))
        if isinstance(value, nn.Module):
            self.modules.append(value)
            self._visit_namespace(vars(value), _KEPT_KEYS)
            for child in value.children():
                self._visit(child)
        elif isinstance(value, Tensor):
            self.tensors.append(value)
        elif isinstance(value, (list, tuple, dict, set, deque)):
            self._visit_container(value)
        elif (state := _state_of(value)) is not None:
            self._restores.append(state)
        elif isinstance(value, MethodType):
            self._visit(value.__self__)
        elif isinstance(value, Optimizer):
            self._visit_optimizer(value)
        elif isinstance(value, (LRScheduler, ReduceLROnPlateau)) or self._is_searched(value):
            self._visit_slots(value)
            self._visit_namespace(getattr(value, "__dict__", {}))

    def _is_searched(self, value: Any) -> bool:
        """Whether an object may be a host's own: an average, a queue, a counter of any package."""
        package = _package(value)
        return package in self._own or package not in _NOT_SEARCHED

    def _visit_trainer(self, trainer: Any) -> None:
        """Note what a step may change of a trainer's: learning rates and their schedules."""
        for optimizer in getattr(trainer, "optimizers", None) or ():
            self._visit(optimizer)
        for config in getattr(trainer, "lr_scheduler_configs", None) or ():
            self._visit(config.scheduler)

    def _visit_optimizer(self, optimizer: Optimizer) -> None:
        """Note the settings of its groups; it makes no step here, so its averages stay."""
        for group in optimizer.param_groups:
            before = dict(group)
            self._restores.append(functools.partial(restore_dict, group, before))
            for name, value in before.items():
                if name != "params":
                    self._visit(value)

    def _visit_namespace(
        self, namespace: dict[str, Any], kept: frozenset[str] = frozenset()
    ) -> None:
        before = {k: v for k, v in namespace.items() if k not in kept}
        self._restores.append(lambda: restore_dict(namespace, before, kept))
        for value in before.values():
            self._visit(value)

    def _visit_slots(self, value: Any) -> None:
        before = {name: getattr(value, name) for name in _slots(value) if hasattr(value, name)}
        if before:
            self._restores.append(functools.partial(_restore_slots, value, before))
        for entry in before.values():
            self._visit(entry)

    def _visit_container(self, container: Any) -> None:
        if isinstance(container, dict):
            entries = dict(container)
            self._restores.append(lambda: restore_dict(container, entries))
        elif not isinstance(container, tuple):
            items = list(container)
            self._restores.append(lambda: _restore_items(container, items))
        if len(container) <= _LARGEST_SEARCHED:
            for value in container.values() if isinstance(container, dict) else container:
                self._visit(value)


def restore_dict(
    values: dict[str, Any], before: dict[str, Any], kept: frozenset[str] = frozenset()
) -> None:
    """Make a dictionary hold the objects it held before, in their order; `kept` keys stay."""
    now = {key: value for key, value in values.items() if key not in kept}
    if list(now) == list(before) and all(now[key] is before[key] for key in now):
        return
    for key in now:
        del values[key]
    values.update(before)


def _slots(value: object) -> set[str]:
    found: set[str] = set()
    for cls in type(value).__mro__:
        own = vars(cls).get("__slots__", ())
        found |= {own} if isinstance(own, str) else set(own)
    return {name for name in found if not name.startswith("__")}


def _restore_slots(value: object, before: dict[str, Any]) -> None:
    for name, entry in before.items():
        if getattr(value, name, None) is not entry:
            object.__setattr__(value, name, entry)  # also where a frozen dataclass refuses


def _restore_items(container: Any, items: list[Any]) -> None:
    if len(container) == len(items) and all(map(operator.is_, container, items)):
        return
    container.clear()
    (container.update if isinstance(container, set) else container.extend)(items)


def _package(value: object) -> str:
    return type(value).__module__.partition(".")[0]


def _state_of(value: Any) -> Callable[[], None] | None:
    """Return what puts a random generator or an array back, None for anything else."""
    if isinstance(value, np.ndarray):
        array = value.copy()
        return lambda: np.copyto(value, array) if value.flags.writeable else None
    return generator_state(value)
