"""How much of a perturbation images carry already, told from their pixels alone.

Images that a poison of classes or clusters was added to have new keys and the old labels, so that
nothing but their pixels tells that a second time would be one too many.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from cp_plugin.data.fit import keeping_grey

CARRIED = 0.25
"""Share of delta from which images are taken to carry it. Clean images carry about 0; pictures that
delta was brought to the size of, and that are brought back to its own, carry about 0.45. Pictures
of black and white pixels alone lose half of delta and are not told."""
CERTAIN = 10.0
"""Standard errors that the share has to be away from 0."""


def share_carried(images_BCHW: Tensor, delta_BCHW: Tensor) -> Tensor:
    """Return how much of a perturbation is in each image: 1 if it was added, about 0 if not.

    It is the least-squares coefficient of delta's detail in the image's: what is left of both when
    the mean of each pixel's neighbours is taken off, in which natural images have little.

    Args:
        images_BCHW: uint8.
        delta_BCHW: floating point in units of [0, 1].

    Returns:
        float32 (B), 0 where delta has no detail.
    """
    images = _detail(images_BCHW.float() / 255)
    delta = _detail(keeping_grey(delta_BCHW.float(), images_BCHW))
    share = (images * delta).flatten(1).sum(1) / delta.square().flatten(1).sum(1)
    return share.nan_to_num(0, 0, 0)


class Known:
    """Perturbations of which an image may carry one, see `share_carried`."""

    def __init__(self, delta_KCHW: Tensor) -> None:
        """Take what is to be known of them once.

        Args:
            delta_KCHW: floating point in units of [0, 1].
        """
        grey = torch.zeros_like(delta_KCHW, dtype=torch.uint8)  # black is grey
        kinds = (keeping_grey(delta_KCHW, grey), delta_KCHW)
        self._details = [_detail(kind.float()).flatten(1) for kind in kinds]

    def carried_by(self, image_CHW: Tensor) -> bool:
        """Tell whether an image, uint8 (C, H, W) of the size of delta, carries one of them."""
        is_colour = bool((image_CHW != image_CHW[:1]).any())
        delta_KD = self._details[int(is_colour)]
        image_D = _detail(image_CHW[None].float() / 255).flatten()
        squares_K = delta_KD.square().sum(1)
        share_K = (delta_KD @ image_D / squares_K).nan_to_num(0, 0, 0)
        # Were the details independent, a coefficient would scatter so much.
        scatter_K = image_D.norm() / squares_K.sqrt() / len(image_D) ** 0.5
        return bool(((share_K > CARRIED) & (share_K > CERTAIN * scatter_K)).any())


def many_carry(share_of_own_N: Tensor, share_of_other_N: Tensor) -> bool:
    """Tell whether images carry their own perturbations.

    Args:
        share_of_own_N: `share_carried` of the perturbation that each image would get.
        share_of_other_N: that of one which belongs to other images, 0 where there is none: what an
            image has of its own accord is alike in both.
    """
    excess = share_of_own_N - share_of_other_N
    if len(excess) < 2:
        return False
    mean, error = excess.mean(), excess.std() / len(excess) ** 0.5
    return bool(mean > CARRIED and mean > CERTAIN * error)


def _detail(images_BCHW: Tensor) -> Tensor:
    around = functional.pad(images_BCHW, (1, 1, 1, 1), mode="replicate")
    return images_BCHW - functional.avg_pool2d(around, 3, 1)
