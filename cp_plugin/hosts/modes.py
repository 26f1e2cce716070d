"""The mode in which a noise phase runs a method: statistics and dropout stand still."""

from __future__ import annotations

from torch import nn

READS_FLAG = frozenset(
    {
        ("stable_pretraining.module", "Module"),
        ("stable_pretraining.backbone.vit", "MaskedEncoder"),
        ("stable_pretraining.backbone.patch_masking", "PatchMasking"),
        ("stable_pretraining.backbone.patch_masking", "IJEPAMasking"),
        ("stable_pretraining.backbone.patch_masking", "MultiBlockMasking"),
        ("solo.methods.mae", "MAE"),
    }
)
"""Classes that have a loss, or masks, only while their own `training` flag is set.

None of them holds statistics or dropout itself; the networks inside do.
"""


def reads_flag(module: nn.Module) -> bool:
    """Whether a module does something else than statistics and dropout `if self.training`."""
    return any((cls.__module__, cls.__qualname__) in READS_FLAG for cls in type(module).__mro__)


def hold_still(module: nn.Module) -> None:
    """Put a method in eval mode, so that no statistics move and nothing is dropped.

    Parts whose own code reads their flag keep that one flag set.
    """
    module.eval()
    for part in module.modules():
        if reads_flag(part):
            part.training = True
