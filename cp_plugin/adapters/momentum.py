"""Finding the momentum branch of a module that somebody else wrote."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence

from torch import nn

from cp_plugin.config import UserError

_MOMENTUM_WORD = re.compile(r"(?:^|_)(?:momentum|ema|teacher|target|key|slow)(?:_|\d|$)")


def find_momentum_modules(
    module: nn.Module, names: str | Sequence[str] = "auto"
) -> dict[str, nn.Module]:
    """Return the modules of the momentum branch by name; empty when there are none.

    A branch is a submodule that has a twin (another one with the same parameter names and shapes)
    and is either frozen while its twin trains, or named after its role (`*_momentum`, `teacher_*`,
    `target_*`, `ema_*`, `key_*`).

    Args:
        module: the method.
        names: `auto`, or the submodules' dotted names.

    Raises:
        UserError: a name is no submodule.
    """
    if names != "auto":
        wanted = [names] if isinstance(names, str) else list(names)
        known = dict(module.named_modules())
        for name in wanted:
            if name not in known:
                raise UserError(
                    f"poison.momentum_modules names {name!r}, which is no submodule; known: "
                    f"{', '.join(name for name, _ in module.named_children())}."
                )
        return {name: known[name] for name in wanted}
    candidates = list(_parametrised(module))
    found: dict[str, nn.Module] = {}
    for name, candidate in candidates:
        if any(name.startswith(f"{parent}.") for parent in found):
            continue
        twins = [
            (other_name, other)
            for other_name, other in candidates
            if other is not candidate and _shapes(other) == _shapes(candidate)
        ]
        if not twins:
            continue
        frozen = not _trains(candidate) and any(_trains(other) for _, other in twins)
        named = bool(_MOMENTUM_WORD.search(name.rsplit(".", 1)[-1])) and any(
            not _MOMENTUM_WORD.search(other_name) for other_name, _ in twins
        )
        if frozen or named:
            found[name] = candidate
    return found


def _parametrised(module: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Children and grandchildren with parameters, outermost first."""
    for name, child in module.named_children():
        if any(True for _ in child.parameters()):
            yield name, child
            for inner_name, inner in child.named_children():
                if any(True for _ in inner.parameters()):
                    yield f"{name}.{inner_name}", inner


def _shapes(module: nn.Module) -> list[tuple[str, tuple[int, ...]]]:
    return [(name, tuple(parameter.shape)) for name, parameter in module.named_parameters()]


def _trains(module: nn.Module) -> bool:
    return any(parameter.requires_grad for parameter in module.parameters())
