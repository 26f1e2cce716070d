"""The mode in which a noise phase runs a method: statistics and dropout stand still."""

from __future__ import annotations

from torch import nn

READS_FLAG = ("stable_pretraining.module", "Module")
"""A class whose methods have a loss only while their own `training` flag is set."""


def reads_flag(module: nn.Module) -> bool:
    """Whether a method computes its loss only `if self.training`."""
    return any((cls.__module__, cls.__qualname__) == READS_FLAG for cls in type(module).__mro__)


def hold_still(module: nn.Module) -> None:
    """Put a method in eval mode, so that no statistics move and nothing is dropped.

    A method whose own code reads its flag keeps that one flag set; it is the networks inside that
    hold statistics and dropout.
    """
    module.eval()
    if reads_flag(module):
        module.training = True
