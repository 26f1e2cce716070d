"""Gradients through the momentum branch, whatever the host does to stop them.

A host keeps gradients out of its momentum branch (`@torch.no_grad`, `.detach()`), since it never
trains that branch by them. A perturbation is in both branches, so its gradient needs both.
`momentum_gradients` opens that branch, and only that one, around the host's own loss;
`preserve_state` (in `cp_plugin.hosts.state`) puts the host back as it was.

How it works: in the context, a `TorchFunctionMode` sees every torch function that runs outside the
networks, and every network call tells to which branch it belongs. Where a tensor comes from is then
read off the autograd graph: the nearest network outputs below it are the momentum branch's or the
online branch's. Inside a network nothing is intercepted, so networks run at full speed and may be
compiled.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from cp_plugin.config.settings import UserError
from cp_plugin.hosts.distributed import gather_with_gradient
from cp_plugin.hosts.lineage import (
    Lineage,
    Nudge,
    Origin,
    Patched,
    Role,
    classifiers_of,
    dependent_in,
    drop_graphs,
    graph_below,
    is_node_of,
    roles_of,
    storage_of,
    tensors_in,
    written_by,
)
from cp_plugin.hosts.state import StateGuard, preserve_state
from cp_plugin.util.internals import (
    COMPILED_CALL,
    compiled_call,
    is_compiled,
    pop_function_mode,
    push_function_mode,
    pushed_function_modes,
    tree_map,
    without_torch_functions,
)
from cp_plugin.util.undo import Exchanges

log = logging.getLogger("cp_plugin")

__all__ = [
    "MomentumGradients",
    "StateGuard",
    "check_momentum_gradients",
    "momentum_gradients",
    "preserve_state",
]

_STOPS = frozenset({"detach", "detach_", "requires_grad_"})
_READS = frozenset(
    {"numpy", "__array__", "item", "tolist", "__deepcopy__", "__reduce_ex__"}
    | {"__float__", "__int__", "__bool__", "__index__", "__complex__"}
)


def momentum_gradients(
    module: nn.Module,
    momentum_modules: Sequence[nn.Module],
    classifiers: Sequence[nn.Module] | None = None,
) -> MomentumGradients:
    """Return a context in which gradients flow through the momentum branch of a method.

    Inside, the gradient of the host's loss with respect to its views is the derivative through both
    branches; stop-gradients that belong to no momentum branch (SimSiam's) stay. Without momentum
    modules the context does nothing. It may be entered again and again, once per loss. Once the
    momentum branch has run, its weights keep their values until the context is left.

    Args:
        module: the module that owns every parameter and buffer of the method.
        momentum_modules: the modules of the momentum branch; modules inside them are included.
        classifiers: modules that see labels: they get detached inputs, so that no label reaches
            the perturbation. None: the modules called `…classifier…` or `…probe…`.

    Source: He, Zha, Katabi, "Indiscriminate Poisoning Attacks on Unsupervised Contrastive
        Learning", ICLR 2023, section 3 (dual-branch propagation).
    """
    return MomentumGradients(
        module, momentum_modules, classifiers_of(module) if classifiers is None else classifiers
    )


def check_momentum_gradients(gradients: MomentumGradients, loss: Tensor, delta: Tensor) -> bool:
    """Check that a loss computed under `momentum_gradients` depends on delta by both branches.

    To be called after the `with` block and before the backward pass, until it returns True: it
    walks the whole graph.

    Args:
        gradients: the context in which the loss was computed.
        loss: scalar.
        delta: the tensor that the gradient is asked for.

    Returns:
        Whether that is known; not before the momentum branch has run.

    Raises:
        UserError: no path from the loss to delta, or none through the momentum branch.
    """
    below = graph_below([loss])
    if not any(is_node_of(node, delta) for node in below):
        raise UserError(
            "expected a loss that depends on the views, got one without a gradient to them: the "
            "host cuts every path (`.data`, `torch.inference_mode`, numpy) or does not use its "
            "views. Remove the cut from its training_step or its hooks for batches."
        )
    outputs = gradients.lineage.momentum & below
    if not gradients.momentum_modules or any(
        is_node_of(node, delta) for node in graph_below(outputs)
    ):
        return True
    if not gradients.lineage.momentum_called:  # a method may have a first phase without it
        gradients.tell_idle()
        return False
    raise UserError(
        "expected a loss whose gradient reaches the views through the momentum branch, but the "
        "branch runs, but is cut off: `.data` and `torch.inference_mode` cannot be undone. Remove "
        "them from the "
        "module, name its momentum branch with poison.momentum_modules=[…], or set "
        "poison.dual_branch=false."
    )


class MomentumGradients(TorchFunctionMode):
    """The context that `momentum_gradients` returns."""

    def __init__(
        self,
        module: nn.Module,
        momentum_modules: Sequence[nn.Module],
        classifiers: Sequence[nn.Module] = (),
    ) -> None:
        super().__init__()
        self.module = module
        self.momentum_modules = tuple(momentum_modules)
        self.lineage = Lineage()
        """What the branches returned since the context was entered."""
        self.nudges: dict[int, Nudge] = {}
        """Changes of networks' inputs and outputs, by the networks' identity: for checks."""
        self._branch_memory: set[int] = set()
        self._roles = roles_of(module, self.momentum_modules, classifiers)
        self.exchanged = Exchanges()
        """Calls of networks, and of `all_gather`, while the context is open."""
        self._in_network = False
        self._told = False

    def __enter__(self) -> MomentumGradients:
        """Wrap the networks and start to intercept torch functions."""
        self.lineage = Lineage()
        self._branch_memory = set()
        if self.momentum_modules:
            for module, role in self._roles:
                self._patch(module, role)
            push_function_mode(self)
            self.exchanged.callback(pop_function_mode)
            self.exchanged.enter_context(gather_with_gradient(self._gathers))
        return self

    def __exit__(self, *_: object) -> None:
        """Stop intercepting, unwrap the networks, leave no graph in the host's state."""
        if not self.momentum_modules:
            return
        self.exchanged.close()
        drop_graphs(self.module, self.lineage)

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        """Run one torch function, with a gradient where the momentum branch needs it."""
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        first = args[0] if args else None
        if isinstance(first, Tensor) and first.grad_fn is not None:
            if name in _STOPS and self.lineage.origin(first) == "momentum":
                return first
            if name in _READS:
                return func(first.detach(), *args[1:], **kwargs)
        if name == "__set__":
            return self._set_property(func, args)
        written = written_by(name, args, kwargs)
        if written and self._overwrites_branch(written):
            return written[0]
        if torch.is_grad_enabled():
            keeps = bool(written and dependent_in((args, kwargs)) and self._is_state(written))
            with torch.no_grad() if keeps else nullcontext():
                return func(*args, **kwargs)
        origins = {self.lineage.origin(tensor) for tensor in dependent_in((args, kwargs))}
        if not self._opens(origins, (args, kwargs)) or self._is_state(written):
            return func(*args, **kwargs)
        if "online" in origins:
            args, kwargs = tree_map(self._without_online, (args, kwargs))
        # The host may overwrite these tensors later, since to it they need no gradient.
        with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(_copied, _same):
            return func(*args, **kwargs)

    def tell_idle(self) -> None:
        """Say once that the momentum branch has not run."""
        if not self._told:
            log.warning(
                "the momentum branch has not run yet, so no gradient flows through it; if it never "
                "does, name another one with poison.momentum_modules=[…] or set "
                "poison.dual_branch=false"
            )
        self._told = True

    def _opens(self, origins: set[Origin], arguments: Any) -> bool:
        """Whether a function that runs without gradient belongs to the momentum branch."""
        if origins == {"view"}:
            return not any(isinstance(tensor, nn.Parameter) for tensor in tensors_in(arguments))
        return "momentum" in origins

    def _gathers(self, tensor: Tensor) -> bool:
        if self._in_network or not dependent_in(tensor):
            return False
        origin = self.lineage.origin(tensor)
        return origin == "momentum" or (origin == "view" and not torch.is_grad_enabled())

    def _set_property(self, func: Any, args: tuple[Any, ...]) -> Any:
        """Assign to a tensor's property; only leaves can be told to require no gradient."""
        name = func.__self__.__name__
        if name == "requires_grad" and args[0].grad_fn is not None:
            return None
        if name == "data" and self._overwrites_branch([args[0]]):
            return None
        return func(*args)

    def _overwrites_branch(self, written: Sequence[Any]) -> bool:
        """Whether the momentum branch would change between its forward and its backward pass.

        An EMA step behind the forward pass cannot change this loss, only spoil its gradient.
        """
        if not self.lineage.momentum:
            return False
        if not self._branch_memory:
            branch = (t for m in self.momentum_modules for t in (*m.parameters(), *m.buffers()))
            self._branch_memory = {storage_of(tensor) for tensor in branch}
        return any(storage_of(tensor) in self._branch_memory for tensor in tensors_in(written))

    def _without_online(self, value: Any) -> Any:
        online = isinstance(value, Tensor) and self.lineage.origin(value) == "online"
        return value.detach() if online else value

    def _is_state(self, written: Sequence[Any]) -> bool:
        """Whether a written tensor is the host's own, or a leaf: such writes keep no gradient."""
        targets = [tensor for tensor in tensors_in(written) if tensor.grad_fn is None]
        if not targets:
            return False
        own = {storage_of(t) for m in self.module.modules() for t in tensors_in(vars(m))}
        return any(target.requires_grad or storage_of(target) in own for target in targets)

    def _patch(self, module: nn.Module, role: Role) -> None:
        name = "forward" if compiled_call(module) is None else COMPILED_CALL
        call = Patched(self, module, getattr(module, name), role, is_compiled(module))
        self.exchanged.entry(vars(module), name, call)

    def call(
        self, original: Callable[..., Any], role: Role, compiled: bool, args: Any, kwargs: Any
    ) -> Any:
        """Call a network: gradient, interception and record as its role asks."""
        if self._in_network:
            output = original(*args, **kwargs)
            self.lineage.record(output, role)  # a forward hook of the host may take it away
            return output
        with self._uninterrupted():
            origins = {self.lineage.origin(tensor) for tensor in dependent_in((args, kwargs))}
            on_momentum = role == "online" and "momentum" in origins
            if not on_momentum or compiled:
                if role == "classifier":
                    args, kwargs = tree_map(blank if self.nudges else _detached, (args, kwargs))
                opens = on_momentum or (role == "momentum" and bool(origins - {"online"}))
                with torch.set_grad_enabled(torch.is_grad_enabled() or opens):
                    output = original(*args, **kwargs)
                if not on_momentum:
                    self.lineage.record(output, role)
                return output
        return original(*args, **kwargs)

    @contextmanager
    def _uninterrupted(self) -> Iterator[None]:
        """Take the mode off the stack: networks and compilers see what they always see."""
        mode = pop_function_mode() if pushed_function_modes() else None
        if mode is not None and mode is not self:
            push_function_mode(mode)
        self._in_network = True
        try:
            with without_torch_functions() if mode not in (self, None) else nullcontext():
                yield
        finally:
            self._in_network = False
            if mode is self:
                push_function_mode(self)


def _detached(value: Any) -> Any:
    return value.detach() if isinstance(value, Tensor) else value


def blank(value: Any) -> Any:
    """Return zeros for a tensor of numbers: what reads them reads nothing."""
    is_float = isinstance(value, Tensor) and value.is_floating_point()
    return torch.zeros_like(value) if is_float else value


def _copied(tensor: Tensor) -> Tensor:
    return tensor.detach().clone()


def _same(tensor: Tensor) -> Tensor:
    return tensor
