"""Contrastive poisoning for the self-supervised learning frameworks that people already use.

`CraftPoison`, `InjectPoison`, `Defence` and `KNNMonitor` are Lightning callbacks; `PoisonLoop`,
`poisoned` and `defended` serve loops written by hand; `Poison` is a poison file. They are imported
at first use, so that `import cp_plugin` stays cheap.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from cp_plugin.attack.poison_file import Poison
    from cp_plugin.callbacks import CraftPoison, Defence, InjectPoison, KNNMonitor
    from cp_plugin.defences import defended
    from cp_plugin.loop import PoisonLoop, poisoned

__all__ = [
    "CraftPoison",
    "Defence",
    "InjectPoison",
    "KNNMonitor",
    "Poison",
    "PoisonLoop",
    "defended",
    "poisoned",
]

_HOME = {  # where each public name is defined
    "CraftPoison": "cp_plugin.callbacks",
    "Defence": "cp_plugin.callbacks",
    "defended": "cp_plugin.defences",
    "InjectPoison": "cp_plugin.callbacks",
    "KNNMonitor": "cp_plugin.callbacks",
    "Poison": "cp_plugin.attack.poison_file",
    "PoisonLoop": "cp_plugin.loop",
    "poisoned": "cp_plugin.loop",
}


def __getattr__(name: str) -> Any:
    if name == "hydra_plugin":  # `_target_` of configurations that version 0.1 wrote
        return import_module("cp_plugin.integrations.hydra_plugin")
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOME[name]), name)


def __dir__() -> list[str]:
    return __all__
