"""Contrastive poisoning for the self-supervised learning frameworks that people already use.

`CraftPoison`, `InjectPoison` and `KNNMonitor` are Lightning callbacks; `PoisonLoop` and `poisoned`
serve loops written by hand; `Poison` is a poison file. They are imported at first use, so that
`import cp_plugin` stays cheap.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from cp_plugin.callbacks import CraftPoison, InjectPoison, KNNMonitor
    from cp_plugin.loop import PoisonLoop, poisoned
    from cp_plugin.poison import Poison

__all__ = ["CraftPoison", "InjectPoison", "KNNMonitor", "Poison", "PoisonLoop", "poisoned"]

_HOME = {
    "CraftPoison": "cp_plugin.callbacks",
    "InjectPoison": "cp_plugin.callbacks",
    "KNNMonitor": "cp_plugin.callbacks",
    "Poison": "cp_plugin.poison",
    "PoisonLoop": "cp_plugin.loop",
    "poisoned": "cp_plugin.loop",
}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOME[name]), name)


def __dir__() -> list[str]:
    return __all__
