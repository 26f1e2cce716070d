"""Frameworks of SSL methods behind one protocol, and gradients through their momentum branch."""

from __future__ import annotations

from typing import Any

from cp_plugin.hosts.lightning import LightningHost
from cp_plugin.hosts.solo_learn import SoloHost, is_solo
from cp_plugin.hosts.stable_pretraining import SptHost, is_spt


def adapt(module: Any, *arguments: Any) -> LightningHost:
    """Return the host of a module, by the framework that it belongs to.

    Args:
        module: a LightningModule.
        arguments: those of `LightningHost` after the module.
    """
    return host_class(module)(module, *arguments)


def host_class(module: Any) -> type[LightningHost]:
    """Return the kind of host that a LightningModule needs, by the framework it belongs to."""
    if is_spt(module):
        return SptHost
    return SoloHost if is_solo(module) else LightningHost
