"""Frameworks behind the protocol of `cp_plugin.host`."""

from __future__ import annotations

from typing import Any

from cp_plugin.adapters.lightly import LightningHost
from cp_plugin.adapters.solo import SoloHost, is_solo


def adapt(module: Any, *arguments: Any) -> LightningHost:
    """Return the host of a module, by the framework that it belongs to.

    Args:
        module: a LightningModule.
        arguments: those of `LightningHost` after the module.
    """
    return (SoloHost if is_solo(module) else LightningHost)(module, *arguments)
