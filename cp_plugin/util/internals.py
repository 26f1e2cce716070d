"""Every private interface of another package that is used, each with the reason.

A private name may change with any release, so each stands here once, as a small function or as the
object itself where a call more would cost time, and `tests/unit/util/test_internals.py` tells by
its name which one has changed. The upper bounds in `pyproject.toml` are the versions that were
tested.
"""

from __future__ import annotations

from collections.abc import Callable
from subprocess import Popen
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm as BatchNormBase
from torch.nn.modules.batchnorm import _NormBase as NormBase
from torch.utils._pytree import tree_map
from torch.utils.data import DataLoader
from torch.utils.data.dataloader import _BaseDataLoaderIter as LoaderIterator

__all__ = [
    "BatchNormBase",
    "LoaderIterator",
    "NormBase",
    "backbones",
    "before_epochs",
    "compiled_call",
    "compiled_module",
    "copy_all",
    "finish_epoch",
    "forget_iterators",
    "hydra_callbacks",
    "is_compiled",
    "is_view",
    "iterates_anew",
    "job_result",
    "launched",
    "launched_here",
    "own_modules",
    "policies_of",
    "policy_strengths",
    "pop_function_mode",
    "push_function_mode",
    "pushed_function_modes",
    "registered",
    "remake_fetcher",
    "trainer_of",
    "training_source",
    "tree_map",
    "version",
    "without_torch_functions",
]

# torch: the stack of `TorchFunctionMode`s. `with mode:` can only enter and leave at the top, but a
# network must run without the mode in the midst of its block, and `compile` must not see it.
push_function_mode: Callable[[Any], None] = torch._C._push_on_torch_function_stack
pop_function_mode: Callable[[], Any] = torch._C._pop_torch_function_stack
pushed_function_modes: Callable[[], int] = torch._C._len_torch_function_stack

# torch: plain calls in the midst of a `TorchFunctionMode`, whatever subclasses or modes say.
without_torch_functions: Any = torch._C.DisableTorchFunction

# torch: copies many tensors in one launch, as its optimizers do; a loop takes a launch a tensor.
copy_all: Callable[[list[Tensor], list[Tensor]], None] = torch._foreach_copy_

COMPILED_CALL = "_compiled_call_impl"
"""torch: the attribute in which `Module.compile` keeps the call that stands for `forward`."""
TRAINER_NAMES = ("_trainer", "_fabric")
"""Lightning: where a module keeps who trains it. `module.trainer` raises where there is none."""


def version(tensor: Tensor) -> int:
    """Return what grows with each write in place: a change is seen without reading the content."""
    return tensor._version


def is_view(tensor: Tensor) -> bool:
    """Whether a tensor is a view of another one, which `detach_` refuses."""
    return bool(tensor._is_view())


def registered(module: nn.Module) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
    """Return a module's own parameters, buffers and modules.

    The dictionaries themselves: what a host has put in another's place is put back in them, and
    their order is that of `state_dict`.
    """
    return module._parameters, module._buffers, module._modules


def own_modules(copied: nn.Module, original: nn.Module) -> dict[str, Any]:
    """Give a bare copy of a module a table of modules of its own, and return that table."""
    table = dict(original._modules)
    vars(copied)["_modules"] = table
    return table


def compiled_call(module: nn.Module) -> Any:
    """Return the compiled call of a module, None where `Module.compile` was not called."""
    return module._compiled_call_impl


def is_compiled(module: nn.Module) -> bool:
    """Whether `torch.compile` or `Module.compile` was applied to this very module.

    What a compiled module contains is left to the compiler, so it has to be known as one.
    """
    return compiled_call(module) is not None or hasattr(module, "_torchdynamo_orig_callable")


def compiled_module(module: nn.Module) -> nn.Module:
    """Return the module that `torch.compile` was given, the module itself where it was not."""
    original: nn.Module = getattr(module, "_orig_mod", module)
    return original


def forget_iterators(loader: DataLoader[Any]) -> None:
    """Let a loader make its workers anew: persistent ones hold the data set they began with."""
    loader._iterator = None


def remake_fetcher(trainer: Any) -> None:
    """Make Lightning's iterator anew: the first epoch's is made before any callback can look.

    There is none where nothing is left to train.
    """
    if trainer.fit_loop._data_fetcher is not None:
        iter(trainer.fit_loop._data_fetcher)


def finish_epoch(trainer: Any) -> None:
    """Let a run that goes on from the end of an epoch begin the next one; call before it starts.

    With `max_steps` Lightning takes that epoch for an interrupted one: it trains on one batch more
    and counts the epoch twice.
    """
    loop = trainer.fit_loop
    now = loop.epoch_progress.current
    if loop.restarting and now.ready == now.started == now.processed:
        owner = next(kind for kind in type(loop).__mro__[1:] if "restarting" in vars(kind))
        vars(owner)["restarting"].fset(loop, False)  # the loop's own would set it again


def before_epochs(trainer: Any, call: Callable[[], Any]) -> None:
    """Call something once the loops are as a checkpoint has them; Lightning has no such hook."""
    loop = trainer.fit_loop
    own = type(loop).reset

    def reset() -> None:
        del vars(loop)["reset"]
        call()
        own(loop)

    vars(loop)["reset"] = reset


def iterates_anew(trainer: Any) -> bool:
    """Whether Lightning makes a new iterator as the epoch starts that is about to.

    Of the first epoch, and of the first after a resume, it has made it already.
    """
    loop = trainer.fit_loop
    resumes = bool(loop.epoch_loop.restarting or getattr(loop, "is_resuming", False))
    return trainer.current_epoch > 0 and not resumes


def training_source(trainer: Any) -> Any:
    """Return what Lightning asks for its training loader, by `dataloader()`.

    Nothing random happens between that and the loader's first iterator.
    """
    return trainer.fit_loop._data_source


def trainer_of(module: Any) -> Any:
    """Return the trainer that runs a LightningModule, None where none does."""
    return getattr(module, TRAINER_NAMES[0], None)


def launched_here(trainer: Any) -> bool:
    """Whether the processes of a run are those that Lightning's first one starts by itself."""
    launcher = trainer.strategy.launcher
    environment = getattr(launcher, "cluster_environment", None)
    kinds = (type(launcher).__name__, type(environment).__name__)
    return kinds == ("_SubprocessScriptLauncher", "LightningEnvironment")


def launched(trainer: Any) -> list[Popen[Any]]:
    """Return the processes that the first one of a node has started; of others none."""
    return list(trainer.strategy.launcher.procs)


def job_result(job_return: Any) -> Any:
    """Return what a Hydra job returned or raised; the public property raises it again."""
    return job_return._return_value


def hydra_callbacks() -> Any:
    """Return Hydra's collection of callbacks, which a launcher that is set up by hand asks for."""
    from hydra._internal.callbacks import Callbacks

    return Callbacks()


def backbones(base_method: Any) -> dict[str, Any]:
    """Return solo-learn's table of backbones by name: the only place where one can be added."""
    table: dict[str, Any] = base_method._BACKBONES
    return table


def policies_of(auto_augment: Any) -> list[tuple[tuple[str, float, int | None], ...]]:
    """Return the pairs of a torchvision `AutoAugment`: names, chances, numbers of strengths."""
    found: list[tuple[tuple[str, float, int | None], ...]]
    found = getattr(auto_augment, "_policies", None) or auto_augment.policies
    return found


def policy_strengths(
    transform: Any, bins: int, height: int, width: int
) -> dict[str, tuple[Tensor | None, bool]]:
    """Return what torchvision's AutoAugment, RandAugment, TrivialAugmentWide or AugMix draws from.

    Args:
        transform: one of them, of v1 or v2.
        bins: number of strengths.
        height: of the image, in pixels.
        width: of the image, in pixels.

    Returns:
        For each name its strengths, in torchvision's units (`Solarize` in levels), None where it
        has none, and whether half of them are negative.
    """
    table = getattr(transform, "_AUGMENTATION_SPACE", None)
    if table is not None:  # v2
        if not getattr(transform, "all_ops", True):
            table = transform._PARTIAL_AUGMENTATION_SPACE
        found = {
            name: (make(bins, height, width), signed) for name, (make, signed) in table.items()
        }
        return {name: (_levels(name, value), signed) for name, (value, signed) in found.items()}
    of_size = () if type(transform).__name__ == "TrivialAugmentWide" else ((height, width),)
    space = transform._augmentation_space(bins, *of_size)
    return {
        name: (value if value.ndim else None, signed) for name, (value, signed) in space.items()
    }


def _levels(name: str, strengths: Tensor | None) -> Tensor | None:
    return strengths.double() * 255 if strengths is not None and name == "Solarize" else strengths
