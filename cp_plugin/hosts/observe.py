"""One training step watched: which networks ran, which the loss trains, which it is cut from."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from cp_plugin.data.batch import Batch
from cp_plugin.hosts.attributes import FRAMEWORKS
from cp_plugin.hosts.lineage import graph_above, graph_below, nodes_from, tensors_in
from cp_plugin.hosts.modes import hold_still
from cp_plugin.hosts.protocol import LossRequest, LossRequests
from cp_plugin.hosts.state import preserve_state
from cp_plugin.util.internals import TRAINER_NAMES, is_compiled, registered, version


@dataclass
class Observation:
    """What was seen; networks are told apart by identity."""

    calls: dict[int, list[bool]] = field(default_factory=dict)
    """By unit that ran: for every call, whether its input carried a gradient."""
    trained: set[int] = field(default_factory=set)
    """Parameters that the loss trains."""
    connected: set[int] = field(default_factory=set)
    """Units with an output from which a gradient path leads to the loss."""
    borrowed: set[int] = field(default_factory=set)
    """Units that ran without gradient on weights that are not their own."""
    bare_readers: list[tuple[nn.Module, str]] = field(default_factory=list)
    """Trained parameters of no network, owner and name, that only read what is cut from views."""
    shown: bool = False
    """Whether the step had a loss."""
    written: set[int] = field(default_factory=set)
    """Parameters that the step itself wrote."""

    def ran(self, network: nn.Module) -> bool:
        """Whether a part of the network was called."""
        return any(id(unit) in self.calls for unit in units_in(network))

    def trains(self, network: nn.Module) -> bool:
        """Whether the loss has a gradient for a parameter of the network."""
        return any(id(parameter) in self.trained for parameter in network.parameters())

    def cuts(self, network: nn.Module) -> bool:
        """Whether no gradient can flow from the loss into the network."""
        return not any(id(unit) in self.connected for unit in units_in(network))

    def writes(self, network: nn.Module) -> bool:
        """Whether the step wrote to weights of the network."""
        return any(id(parameter) in self.written for parameter in network.parameters())

    def readers(self, module: nn.Module) -> list[nn.Module]:
        """Return the units that train, but only ever on input cut from the views: probes."""
        return [
            unit
            for network in named_networks(module).values()
            for unit in units_in(network)
            if self.trains(unit) and self.calls.get(id(unit)) and not any(self.calls[id(unit)])
        ]


def observing(
    module: nn.Module, views: Sequence[Tensor], batch: Batch, seen: Observation
) -> LossRequests:
    """Watch one step in eval mode, as in the noise phase; the module is left as it was.

    Args:
        module: the method.
        views: V views, each float (B, C, h, w).
        batch: what they were made of.
        seen: what is filled in.
    """
    outputs: list[tuple[nn.Module, Any]] = []

    def note(unit: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        weights = registered(unit)[0].values()
        if any(w is not None and id(w) not in own for w in weights) and not any(
            w.requires_grad for w in weights if w is not None
        ):
            seen.borrowed.add(id(unit))
        inputs = [t for t in tensors_in((args, kwargs)) if t.is_floating_point()]
        carries = any(t.requires_grad and not isinstance(t, nn.Parameter) for t in inputs)
        seen.calls.setdefault(id(unit), []).append(carries)
        outputs.extend((unit, tensor.grad_fn) for tensor in _outputs(output))

    def on_loss(loss: Tensor, weight: Tensor | None = None, retain_graph: bool = False) -> None:
        seen.shown = True
        below = graph_below([loss])
        known = _replaced(networks, named_networks(module))
        trained = (id(node.variable) for node in below if hasattr(node, "variable"))
        seen.trained |= {known.get(key, key) for key in trained}
        connected = (id(unit) for unit, node in outputs if node is not None and node in below)
        seen.connected |= {known.get(key, key) for key in connected}
        for key in known.keys() & seen.calls.keys():
            seen.calls.setdefault(known[key], []).extend(seen.calls.pop(key))
        seen.bare_readers += _bare_readers(module, seen, below, leaves)
        after = _states(units.values())
        seen.written |= {key for key, state in after.items() if before.get(key, state) != state}

    networks = named_networks(module)
    units = {id(u): u for network in networks.values() for u in units_in(network)}
    with preserve_state(module, freeze=False), torch.enable_grad():
        hold_still(module)
        own = {id(p) for p in module.parameters()} | {
            id(p) for unit in units.values() for p in unit.parameters()
        }
        leaves = [view.detach().requires_grad_() for view in views]
        before = _states(units.values())
        hooks: list[RemovableHandle] = [
            unit.register_forward_hook(note, with_kwargs=True) for unit in units.values()
        ]
        try:
            yield LossRequest([leaf.clone() for leaf in leaves], batch, on_loss)
        finally:
            for hook in hooks:
                hook.remove()


def named_networks(module: nn.Module) -> dict[str, nn.Module]:
    """Return every network with parameters by its dotted name, outermost first.

    Those that a module keeps in lists, tuples or dictionaries are named `list.0`, `dict.key`.
    """
    found: dict[str, nn.Module] = {}
    seen: set[int] = {id(module)}
    todo: list[tuple[str, nn.Module]] = [("", module)]
    while todo:
        prefix, parent = todo.pop(0)
        for name, child in _children(parent):
            if id(child) not in seen and any(True for _ in child.parameters()):
                seen.add(id(child))
                found[f"{prefix}{name}"] = child
                todo.append((f"{prefix}{name}.", child))
    return found


def units_in(network: nn.Module) -> Iterator[nn.Module]:
    """Yield the modules that hold parameters of their own; a compiled one counts as a whole."""
    if is_compiled(network) or any(True for _ in network.parameters(recurse=False)):
        yield network
        if is_compiled(network):
            return
    for child in network.children():
        yield from units_in(child)


def _children(module: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    yield from module.named_children()
    registered = set(vars(nn.Module())) | set(TRAINER_NAMES)
    for name, value in vars(module).items():
        if name not in registered:
            yield from _hidden(name, value)


def _hidden(name: str, value: Any) -> Iterator[tuple[str, nn.Module]]:
    if isinstance(value, nn.Module):
        yield name, value
    elif isinstance(value, (list, tuple)):
        for number, item in enumerate(value[:64]):
            yield from _hidden(f"{name}.{number}", item)
    elif isinstance(value, dict):
        for key, item in list(value.items())[:64]:
            yield from _hidden(f"{name}.{key}", item)
    elif type(value).__module__.partition(".")[0] not in FRAMEWORKS:  # an average that is no module
        for key, item in getattr(value, "__dict__", {}).items():
            if isinstance(item, nn.Module):
                yield f"{name}.{key}", item


LINEAR = frozenset(
    {"AddBackward0", "SubBackward0", "NegBackward0", "SumBackward0", "MeanBackward0"}
    | {"StackBackward0", "CatBackward0", "ToCopyBackward0", "CloneBackward0", "ViewBackward0"}
)
"""Graph nodes through which two terms of a loss pass without changing each other's gradient."""
SCALING = frozenset({"MulBackward0", "DivBackward0"})
"""Linear where one side alone has a gradient."""


def _bare_readers(
    module: nn.Module, seen: Observation, below: set[Any], leaves: Sequence[Tensor]
) -> list[tuple[nn.Module, str]]:
    """Return parameters outside networks that meet the views only where terms are added up."""
    bare = {
        id(parameter): (owner, name)
        for owner in module.modules()
        if owner is module or not seen.calls.get(id(owner))
        for name, parameter in registered(owner)[0].items()
        if parameter is not None and id(parameter) in seen.trained
    }
    if not bare:
        return []
    above = graph_above(below)
    collected = {id(node.variable): node for node in below if hasattr(node, "variable")}
    views = [collected[id(leaf)] for leaf in leaves if id(leaf) in collected]
    dependent = nodes_from(views, above)
    return [
        place
        for key, place in bare.items()
        if all(_is_linear(node) for node in nodes_from([collected[key]], above) & dependent)
    ]


def _is_linear(node: Any) -> bool:
    parents = [parent for parent, _ in node.next_functions if parent is not None]
    return node.name() in LINEAR or (node.name() in SCALING and len(parents) == 1)


def _replaced(before: dict[str, nn.Module], now: dict[str, nn.Module]) -> dict[int, int]:
    """Return, for units and parameters that a step has put in others' places, whose places."""
    found: dict[int, int] = {}
    for name, network in now.items():
        old = before.get(name)
        if old is not None and old is not network:
            found |= {id(a): id(b) for a, b in zip(units_in(network), units_in(old), strict=False)}
            pairs = zip(network.parameters(), old.parameters(), strict=False)
            found |= {id(a): id(b) for a, b in pairs}
    return found


def _states(units: Iterable[nn.Module]) -> dict[int, tuple[int, int]]:
    """Return what changes when a parameter is written to, in place or through `.data`."""
    parameters = (parameter for unit in units for parameter in unit.parameters())
    return {id(p): (version(p), p.data_ptr()) for p in parameters}


def _outputs(output: Any) -> Iterator[Tensor]:
    yield from tensors_in(vars(output) if hasattr(output, "__dataclass_fields__") else output)
