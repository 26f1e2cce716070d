"""A host left as it was guard: what a noise step changes in it is put back, bit for bit.

A `training_step` may move the momentum branch (EMA), push a queue, update batch statistics, draw
random numbers, append to lists and log. None of this may happen because a perturbation was crafted.
"""

from __future__ import annotations

import importlib
from collections import defaultdict
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from cp_plugin.hosts.attributes import Attributes, restore_dict
from cp_plugin.util.internals import copy_all, is_view, registered, trainer_of, version
from cp_plugin.util.random_state import RandomState
from cp_plugin.util.undo import Exchanges


def preserve_state(module: nn.Module, freeze: bool = True) -> StateGuard:
    """Return a context that puts a host back, on exit, exactly as it was on entry.

    Put back are: parameters, buffers (also rebound ones), `requires_grad`, `.grad`, the training
    flag of every submodule, plain Python attributes (numbers, containers, tensors, arrays,
    generators, objects of the host's own classes), and the random state of Python, numpy, the CPU
    and the module's devices. Inside, `LightningModule.log` and the trainer's loggers are silent.

    Enter it once a noise phase and call `StateGuard.restore` between the steps, or once a step:
    entering costs a copy of the weights, `restore` only of what a step was seen to change.

    Args:
        module: the module that owns every parameter and buffer of the method.
        freeze: let no parameter require a gradient inside, so that autograd computes the path to
            delta alone.
    """
    return StateGuard(module, freeze)


class StateGuard:
    """The context that `preserve_state` returns."""

    def __init__(self, module: nn.Module, freeze: bool = True) -> None:
        self._module = module
        self._freeze = freeze

    def __enter__(self) -> StateGuard:
        """Take the snapshot, silence the logs, freeze the parameters."""
        self._attributes = Attributes(self._module)
        modules = self._attributes.modules
        self._tensors = _Tensors(modules, self._attributes.tensors)
        self._random = RandomState(self._tensors.devices)
        self._training = [(m, m.training) for m in modules]
        parameters = {id(p): p for m in modules for p in m.parameters(recurse=False)}.values()
        self._gradients = [(p, p.requires_grad, p.grad) for p in parameters]
        for parameter, _, _ in self._gradients:
            # Taken away, so that neither a backward pass nor zero_grad can reach it.
            parameter.grad = None
            if self._freeze:
                parameter.requires_grad_(False)
        self._silence = _silenced(modules)
        return self

    def restore(self) -> None:
        """Undo what a noise step did to parameters, buffers and attributes; for use between steps.

        Training flags and random state stay, so that the next step runs in the same mode and draws
        other numbers; they are put back on exit.
        """
        self._attributes.restore()
        self._tensors.restore()

    def __exit__(self, *_: object) -> None:
        """Put everything back."""
        self._silence.close()
        self._attributes.restore()
        self._tensors.restore(every=True)
        for module, training in self._training:
            module.training = training
        for parameter, requires_grad, gradient in self._gradients:
            parameter.requires_grad_(requires_grad)
            parameter.grad = gradient
        self._random.restore()


class _Tensors:
    """Parameters, buffers and other tensors: which object hangs where, and what is in it."""

    def __init__(self, modules: Iterable[nn.Module], others: Iterable[Tensor]) -> None:
        self._places = [(place, dict(place)) for m in modules for place in registered(m) if place]
        found: dict[int, Tensor] = {}
        for _, entries in self._places:
            found |= {id(t): t for t in entries.values() if isinstance(t, Tensor)}
        found |= {id(t): t for t in others if not t.is_inference()}
        self._owners = list(found.values())
        self.devices = {t.device for t in self._owners}
        # Aliases of the memory itself: `.data = …` on the owner does not move them.
        self._aliases = [t.data for t in self._owners]
        self._memory = [_without_repeats(t) for t in self._aliases]
        self._saved = [t.clone() for t in self._memory]
        self._versions = [version(t) for t in self._owners]
        self._changing: set[int] | None = None

    @torch.no_grad()
    def restore(self, every: bool = False) -> None:
        """Put objects and contents back; `every` trusts no sign that a content is unchanged."""
        for place, entries in self._places:
            restore_dict(place, entries)
        changed = [index for index in range(len(self._owners)) if self._rebind(index) or every]
        if not every:
            changed = sorted(self._hidden_changes(set(changed)).union(changed))
        _copy([self._memory[i] for i in changed], [self._saved[i] for i in changed])
        for index in changed:
            self._versions[index] = version(self._owners[index])

    def _rebind(self, index: int) -> bool:
        """Give an owner its memory back; return whether there are signs of a change."""
        owner, alias = self._owners[index], self._aliases[index]
        changed = version(owner) != self._versions[index] or not owner.is_cpu
        if owner.grad_fn is not None and not is_view(owner):  # torch detaches no view in place
            owner.detach_()
        if _memory_of(owner) != _memory_of(alias):
            owner.data = alias
            changed = True
        return changed

    def _hidden_changes(self, known: set[int]) -> set[int]:
        """Return what is written through `.data`, which leaves no sign: looked for once."""
        if self._changing is None:
            self._changing = {
                index
                for index, (now, then) in enumerate(zip(self._memory, self._saved, strict=True))
                if index not in known and not _same(now, then)
            }
        return self._changing


def _silenced(modules: Iterable[nn.Module]) -> Exchanges:
    """Let logging do nothing until what is returned is closed."""
    exchanged = Exchanges()
    loggers = [module for module in modules if hasattr(type(module), "log_dict")]
    for module in loggers:
        for name in ("log", "log_dict"):
            exchanged.entry(vars(module), name, _no_log)
    trainers = {id(trainer): trainer for trainer in map(trainer_of, loggers)}
    for trainer in trainers.values():
        if getattr(trainer, "loggers", None):
            exchanged.attribute(trainer, "loggers", [_dummy_logger(trainer)])
    return exchanged


def _no_log(*_: Any, **__: Any) -> None:
    """Stand in for `log` and `log_dict`."""


def _dummy_logger(trainer: Any) -> Any:
    """Return the silent logger of the Lightning package that the trainer comes from."""
    origins = (base.__module__ for base in type(trainer).__mro__)
    package = next(o.rpartition(".trainer.")[0] for o in origins if ".trainer." in o)
    return importlib.import_module(f"{package}.loggers.logger").DummyLogger()


def _memory_of(tensor: Tensor) -> tuple[object, ...]:
    if tensor.layout is not torch.strided:
        return (tensor.shape, tensor.dtype)
    return (tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype)


def _without_repeats(tensor: Tensor) -> Tensor:
    """Return a view in which no element of expanded memory is seen twice: it can be written to."""
    if tensor.layout is not torch.strided:
        return tensor
    steps = zip(tensor.shape, tensor.stride(), strict=True)
    return tensor[
        tuple(slice(0, 1) if not stride and n > 1 else slice(None) for n, stride in steps)
    ]


def _same(first: Tensor, second: Tensor) -> bool:
    """Compare bit patterns roughly as cheaply as values; NaN differs, which costs a copy only."""
    return torch.equal(first, second)


def _copy(targets: Sequence[Tensor], sources: Sequence[Tensor]) -> None:
    """Copy in few launches: fused where all tensors share device and type."""
    groups: defaultdict[tuple[object, ...], tuple[list[Tensor], list[Tensor]]]
    groups = defaultdict(lambda: ([], []))
    for target, source in zip(targets, sources, strict=True):
        group = groups[target.device, target.dtype, target.layout]
        group[0].append(target)
        group[1].append(source)
    for into, values in groups.values():
        copy_all(into, values)
