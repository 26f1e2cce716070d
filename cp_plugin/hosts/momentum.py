"""Finding the momentum branch of a module that somebody else wrote, before and after it has run.

A branch is told by what it is, not by what it is called: a network with a counterpart (same
parameter names and shapes) that trains while it does not. Names and frozen weights are signs that
can be read before the method runs (`find_momentum_modules`); one run of the method then decides
(`confirmed_branch`).
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from cp_plugin.config.settings import UserError
from cp_plugin.hosts.observe import Observation, named_networks, units_in

BRANCH_WORDS = frozenset(
    {"momentum", "ema", "teacher", "target", "key", "slow", "averaged", "polyak", "swa"}
)
ONLINE_WORDS = frozenset({"student", "online", "query", "anchor", "q"})
NAMED_DEPTH = 2
"""Deeper names say nothing before the method has run: attention has keys and queries too."""
LABEL_WORDS = ("classifier", "probe")
LABEL_CLASS = "OnlineLinearClassifier"

_WORDS = re.compile(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+")
Counterparts = dict[str, list[str]]


def find_momentum_modules(
    module: nn.Module, names: str | Sequence[str] = "auto"
) -> dict[str, nn.Module]:
    """Return the modules of the momentum branch by name; empty when there are none.

    Read before the method runs: a network that is frozen while its counterpart trains, or that is
    called after its role (`*_momentum`, `teacher_*`, `target`, `ema`, …) while its counterpart is
    not, or whose counterpart is called `student_*`, `online_*`, … while it is not. Networks that a
    module keeps in lists or dictionaries, where `parameters()` does not see them, count too.

    Args:
        module: the method.
        names: `auto`, or the networks' dotted names.

    Raises:
        UserError: a name is no network of the module.
    """
    known = named_networks(module)
    if names != "auto":
        return _by_name(known, [names] if isinstance(names, str) else list(names))
    counterparts = _counterparts(known)
    found: dict[str, nn.Module] = {}
    for name, candidate in known.items():
        if inside(name, found) or _sees_labels(name, known):
            continue
        others = counterparts[name]
        frozen = not _trains(candidate) and any(_trains(known[other]) for other in others)
        named = name.count(".") < NAMED_DEPTH and any(_named_so(name, other) for other in others)
        if frozen or named:
            found[name] = candidate
    return found


def confirmed_branch(module: nn.Module, observation: Observation) -> dict[str, nn.Module]:
    """Return the momentum branch of a method that was seen running.

    A network belongs to it if it ran, the loss trains none of its parameters, and it has a
    counterpart that the loss does train; and either its outputs reach the loss only where the host
    has cut the gradient, or there is a sign that it follows its counterpart: equal weights, weights
    that the step wrote, or its name. Where it has no counterpart as a whole (a target without the
    predictor), its parts may have.

    Args:
        module: the method.
        observation: of one step, see `cp_plugin.hosts.observe.observing`.
    """
    known = named_networks(module)
    counterparts = _counterparts(known)
    found: dict[str, nn.Module] = {}
    for name, candidate in known.items():
        if inside(name, found) or _sees_labels(name, known):
            continue
        if not observation.ran(candidate) or observation.trains(candidate):
            continue
        others = [known[other] for other in counterparts[name] if observation.trains(known[other])]
        parts = [] if others else _online_parts(candidate, known, observation)
        follows = (
            observation.writes(candidate)
            or any(_same_weights(candidate, other) for other in others or parts)
            or any(_named_so(name, other) for other in counterparts[name])
            or bool(_words(name) & BRANCH_WORDS)
        )
        if (others and observation.cuts(candidate)) or ((others or parts) and follows):
            found[name] = candidate
    return found


def _by_name(known: Mapping[str, nn.Module], wanted: Sequence[str]) -> dict[str, nn.Module]:
    for name in wanted:
        if name not in known:
            outermost = [other for other in known if "." not in other]
            raise UserError(
                f"poison.momentum_modules names {name!r}, which is no network of the module; "
                f"known: {', '.join(outermost)}."
            )
    return {name: known[name] for name in wanted}


def _counterparts(known: Mapping[str, nn.Module]) -> Counterparts:
    """Return, by name, the other networks with the same parameter names and shapes.

    Neither its own parts nor what contains it nor what shares a parameter with it is a counterpart.
    """
    groups: defaultdict[Any, list[str]] = defaultdict(list)
    for name, network in known.items():
        groups[_shapes(network)].append(name)
    counterparts: Counterparts = {}
    for names in groups.values():
        for name in names:
            own = {id(parameter) for parameter in known[name].parameters()}
            counterparts[name] = [
                other
                for other in names
                if other != name and own.isdisjoint(map(id, known[other].parameters()))
            ]
    return counterparts


def _online_parts(
    candidate: nn.Module, known: Mapping[str, nn.Module], observation: Observation
) -> list[nn.Module]:
    """Return a trained counterpart for every unit of a network, or nothing if one unit has none."""
    own = {id(parameter) for parameter in candidate.parameters()}
    trained: defaultdict[Any, list[nn.Module]] = defaultdict(list)
    for network in known.values():
        for unit in units_in(network):
            if observation.trains(unit) and own.isdisjoint(map(id, unit.parameters())):
                trained[type(unit), _shapes(unit)].append(unit)
    parts = [trained[type(unit), _shapes(unit)] for unit in units_in(candidate)]
    return (
        [counterpart for counterparts in parts for counterpart in counterparts]
        if all(parts)
        else []
    )


def _same_weights(candidate: nn.Module, other: nn.Module) -> bool:
    """Tell whether weights are equal that two random draws never make equal."""
    pairs = zip(candidate.parameters(), other.parameters(), strict=False)
    return any(
        a.ndim > 1 and a.shape == b.shape and a.device == b.device and torch.equal(a, b)
        for a, b in pairs
    )


def _named_so(name: str, other: str) -> bool:
    """Tell whether a network is named as the branch, or its counterpart as the one that trains."""
    own, theirs = _words(name), _words(other)
    as_branch = bool(own & BRANCH_WORDS) and not theirs & BRANCH_WORDS
    as_online = bool(theirs & ONLINE_WORDS) and not own & ONLINE_WORDS
    return as_branch or as_online


def _words(name: str) -> set[str]:
    return {word.lower() for word in _WORDS.findall(name)}


def _sees_labels(name: str, known: Mapping[str, nn.Module]) -> bool:
    parents = _prefixes(name)
    return any(word in name.lower() for word in LABEL_WORDS) or any(
        type(known[parent]).__name__ == LABEL_CLASS for parent in parents if parent in known
    )


def inside(name: str, found: Mapping[str, nn.Module]) -> bool:
    """Whether a dotted name is one of those given, or lies below one."""
    return any(parent in found for parent in _prefixes(name))


def _prefixes(name: str) -> Iterator[str]:
    parts = name.split(".")
    for count in range(1, len(parts) + 1):
        yield ".".join(parts[:count])


def _shapes(network: nn.Module) -> tuple[tuple[str, tuple[int, ...]], ...]:
    return tuple((name, tuple(value.shape)) for name, value in network.named_parameters())


def _trains(network: nn.Module) -> bool:
    return any(parameter.requires_grad for parameter in network.parameters())
