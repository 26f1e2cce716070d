"""Sizes, number and normalisation of the views that a trainer's module is given."""

from __future__ import annotations

import logging
from typing import Any

from cp_plugin.data.raw_images import RawImages
from cp_plugin.hosts.lightning import batch_hooks, hook_owner
from cp_plugin.hosts.stable_pretraining import batch_transform, is_spt
from cp_plugin.mirror import Mirror
from cp_plugin.mirror.channels import with_channels
from cp_plugin.mirror.pipeline import mirror_outline

AFTER = "on_after_batch_transfer"

log = logging.getLogger("cp_plugin")


def outline(trainer: Any, module: Any, raw: RawImages) -> Mirror:
    """Return the outline of a data set's transform and of what transforms its batches after it.

    Args:
        trainer: a Lightning trainer.
        module: its module.
        raw: the data set without its transform.

    Raises:
        UserError: as of `mirror_outline`.
    """
    if not is_spt(module):
        if AFTER in batch_hooks(trainer, module):
            log.warning(
                "%s.%s is not looked into: where it normalises batches, let the data set's "
                "transform do so, since that alone tells how images are shown to the encoder",
                type(hook_owner(trainer, module, AFTER)).__name__,
                AFTER,
            )
        return with_channels(mirror_outline(raw.transform), raw)
    of_batches = batch_transform(trainer)
    return with_channels(mirror_outline(raw.transform, of_batches), raw)
