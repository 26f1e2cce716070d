"""Which modules belong to which branch of a method, and small questions to tensors and graphs."""

from __future__ import annotations

import dataclasses
import itertools
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, Literal, Protocol

import torch
from torch import Tensor, nn

from cp_plugin.util.internals import compiled_module, is_compiled, registered
from cp_plugin.util.undo import Exchanges

Role = Literal["momentum", "online", "classifier"]
Origin = Literal["momentum", "online", "view"]

_CLASSIFIER_WORDS = ("classifier", "probe")


def classifiers_of(module: nn.Module) -> list[nn.Module]:
    """Return the modules that are called a classifier or a probe: they see labels."""
    return [
        child
        for name, child in module.named_modules()
        if any(word in name.rpartition(".")[2].lower() for word in _CLASSIFIER_WORDS)
    ]


def roles_of(
    module: nn.Module, momentum: Sequence[nn.Module], classifiers: Sequence[nn.Module]
) -> list[tuple[nn.Module, Role]]:
    """Give every network its role; what a compiled module contains is left to the compiler."""
    of_momentum = {id(m) for root in momentum for m in root.modules()}
    of_classifiers = {id(m) for root in classifiers for m in root.modules()} - of_momentum
    special = of_momentum | of_classifiers
    every = {id(m): m for root in (module, *momentum) for m in root.modules()}
    compiled = {
        id(m)
        for root in every.values()
        if is_compiled(root)
        for m in itertools.islice(root.modules(), 1, None)
    }
    roles: list[tuple[nn.Module, Role]] = []
    for key, candidate in every.items():
        if key in compiled or candidate is module:
            continue
        original = id(compiled_module(candidate))
        if key in of_momentum or original in of_momentum:
            roles.append((candidate, "momentum"))
        elif key in of_classifiers or original in of_classifiers:
            roles.append((candidate, "classifier"))
        elif any(True for _ in candidate.parameters()) and not any(
            id(m) in special for m in candidate.modules()
        ):
            roles.append((candidate, "online"))
    return roles


class Nudge(Protocol):
    """Changes what goes into a network, and what comes out."""

    def inputs(self, arguments: Any) -> Any:
        """Return the positional and named arguments of a call, changed or not."""
        ...

    def outputs(self, output: Any) -> Any:
        """Return what the call returned, changed or not."""
        ...


class Caller(Protocol):
    """What calls a network in place of its own `forward`."""

    def call(
        self, original: Callable[..., Any], role: Role, compiled: bool, args: Any, kwargs: Any
    ) -> Any:
        """Call a network as its role asks."""
        ...

    nudges: dict[int, Nudge]
    """What changes a network's input or output a little, by its identity: for checks."""
    exchanged: Exchanges
    """What undoes the exchange of a network's call."""


class Patched:
    """Stands in a network where its `forward` was."""

    def __init__(
        self,
        caller: Caller,
        module: nn.Module,
        original: Callable[..., Any],
        role: Role,
        compiled: bool,
    ) -> None:
        self._caller, self._module, self._role = caller, module, role
        self._compiled = compiled
        self.__wrapped__ = original

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Call the network as its role asks."""
        nudge = self._caller.nudges.get(id(self._module))
        if nudge is not None:
            args, kwargs = nudge.inputs((args, kwargs))
        output = self._caller.call(self.__wrapped__, self._role, self._compiled, args, kwargs)
        return output if nudge is None else nudge.outputs(output)

    def __deepcopy__(self, memo: dict[int, Any]) -> Patched | None:
        """Return what stands in a copy that a step makes of a network: a new momentum branch."""
        copied = memo.get(id(self._module))
        if copied is None or self._compiled:
            return None
        original = type(copied).forward.__get__(copied)
        role: Role = "classifier" if self._role == "classifier" else "momentum"
        call = Patched(self._caller, copied, original, role, False)
        # The copy's own attributes are filled in only now, with this very call among them.
        self._caller.exchanged.callback(vars(copied).pop, "forward", None)
        return call


class Lineage:
    """Where tensors come from, read off the autograd graph of one loss."""

    def __init__(self) -> None:
        self.momentum: set[Any] = set()
        """Graph nodes of what the momentum branch returned."""
        self.momentum_called = False
        self.inference = False
        """Whether the momentum branch ran in inference mode, which no gradient ever passes."""
        self._online: set[Any] = set()
        self._before_networks: set[Any] = set()

    def record(self, output: Any, role: Role) -> None:
        """Note what a network returned."""
        self.momentum_called |= role == "momentum"
        nodes = self.momentum if role == "momentum" else self._online
        tree = vars(output) if dataclasses.is_dataclass(output) else output
        found = list(tensors_in(tree))
        self.inference |= role == "momentum" and any(tensor.is_inference() for tensor in found)
        nodes.update(tensor.grad_fn for tensor in found if tensor.grad_fn is not None)

    def origin(self, tensor: Tensor) -> Origin:
        """Tell which branch a tensor comes from; `view` is before any network."""
        found: Origin = "view"
        todo: list[Any] = [tensor.grad_fn]
        seen: set[Any] = set()
        while todo:
            node = todo.pop()
            if node in self.momentum:
                return "momentum"
            if node in self._online:
                found = "online"
            elif node is not None and node not in seen and node not in self._before_networks:
                seen.add(node)
                todo.extend(parent for parent, _ in node.next_functions)
        if found == "view":
            self._before_networks |= seen
        return found


def drop_graphs(module: nn.Module, lineage: Lineage) -> None:
    """Detach what a host keeps: buffers, and attributes that come from the momentum branch."""
    for child in module.modules():
        _, buffers, _ = registered(child)
        for place in (buffers, child.__dict__):
            for name, value in place.items():
                if (
                    isinstance(value, Tensor)
                    and value.grad_fn is not None
                    and (place is buffers or lineage.origin(value) == "momentum")
                ):
                    place[name] = value.detach()


def tensors_in(tree: Any) -> Iterator[Tensor]:
    """Yield the tensors in nested lists, tuples and dictionaries."""
    if isinstance(tree, Tensor):
        yield tree
    elif isinstance(tree, (list, tuple)):
        for item in tree:
            yield from tensors_in(item)
    elif isinstance(tree, dict):
        yield from tensors_in(list(tree.values()))


def dependent_in(tree: Any) -> list[Tensor]:
    """Return the tensors that may depend on delta: they require grad and are no parameters."""
    return [t for t in tensors_in(tree) if t.requires_grad and not isinstance(t, nn.Parameter)]


def written_by(name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Any]:
    """Return what a torch function writes to, by torch's naming rules."""
    if kwargs.get("out") is not None:
        return [kwargs["out"]]
    writes = name == "__setitem__" or kwargs.get("inplace") is True
    return list(args[:1]) if writes or (name.endswith("_") and name[-2:] != "__") else []


def storage_of(tensor: Tensor) -> int:
    """Return what two tensors share when a write to one is seen in the other."""
    return tensor.untyped_storage().data_ptr() if tensor.layout is torch.strided else id(tensor)


def graph_below(roots: Iterable[Any]) -> set[Any]:
    """Return every autograd node below tensors or nodes, theirs included."""
    todo = [root.grad_fn if isinstance(root, Tensor) else root for root in roots]
    seen: set[Any] = set()
    while todo:
        node = todo.pop()
        if node is not None and node not in seen:
            seen.add(node)
            todo.extend(parent for parent, _ in node.next_functions)
    return seen


def graph_above(nodes: Iterable[Any]) -> dict[Any, list[Any]]:
    """Return, for the nodes of a graph, those that use what each of them gives."""
    above: dict[Any, list[Any]] = defaultdict(list)
    for node in nodes:
        for parent, _ in node.next_functions:
            if parent is not None:
                above[parent].append(node)
    return above


def nodes_from(starts: Iterable[Any], above: Mapping[Any, Sequence[Any]]) -> set[Any]:
    """Return every node that depends on one of the given ones, these included."""
    todo, seen = list(starts), set()
    while todo:
        node = todo.pop()
        if node not in seen:
            seen.add(node)
            todo.extend(above.get(node, ()))
    return seen


def is_node_of(node: Any, tensor: Tensor) -> bool:
    """Whether an autograd node is the one that made a tensor, or collects its gradient."""
    return (node is tensor.grad_fn) or getattr(node, "variable", None) is tensor
