"""Mirrors of data sets of grey images, or whose transform makes grey views."""

from __future__ import annotations

from cp_plugin.config.settings import UserError
from cp_plugin.data.channels import channels_made, other_channels
from cp_plugin.data.image import is_grey
from cp_plugin.data.raw_images import RawImages
from cp_plugin.mirror.pipeline import Mirror


def with_channels(view_mirror: Mirror, raw: RawImages) -> Mirror:
    """Return the mirror of a data set's transform, set to the channels of the data set's images.

    Raises:
        UserError: the host's own transform makes another number of channels than the mirror.
    """
    if raw.given is None:
        return view_mirror
    view_mirror.grey_images = is_grey(raw.given)
    own = channels_made(raw.transform, raw.given)
    mirrored = set(view_mirror.channels)
    if own and not mirrored <= own:  # a host's transform may return masks beside the views
        raise UserError(other_channels(raw, own, mirrored))
    return view_mirror
