"""The images of a craft, and the mirror of what augments them."""

from __future__ import annotations

from typing import Any

from cp_plugin.attack.stream_start import raw_at_size
from cp_plugin.config.settings import AlternationConfig
from cp_plugin.data import RawDataset, RawStream, streams
from cp_plugin.data.canonical import canonical_size
from cp_plugin.mirror import Mirror, mirror
from cp_plugin.mirror.channels import with_channels


def raw_and_mirror(
    dataset: Any, config: AlternationConfig
) -> tuple[RawDataset | RawStream, Mirror]:
    """Take the transform off a data set and return what it leaves, and the transform's mirror.

    A transform of one view that the data set calls for each of its views is mirrored as often.

    Args:
        dataset: a data set or stream of images.
        config: `image_size` and `fit` are read from it, see `canonical_size`; of a stream what
            `raw_at_size` says too.

    Raises:
        UserError: the transform has no mirror, or a stream does not tell what the settings need.
    """
    own = RawStream(dataset, None) if streams(dataset) else RawDataset(dataset, None)
    view_mirror = mirror(own.transform)
    if view_mirror.views == 1 and own.places > 1:
        view_mirror = mirror([own.transform] * own.places)
    view_mirror = with_channels(view_mirror, own)
    side = view_mirror.resized_side
    if isinstance(own, RawStream):
        return raw_at_size(dataset, side, config), view_mirror
    size = canonical_size(dataset, side, config.image_size, config.fit)
    return RawDataset(dataset, size, config.fit), view_mirror
