"""The embedded methods by the names that solo-learn gives them, and `supervised`."""

from __future__ import annotations

from omegaconf import DictConfig

from cp_plugin.engine.base import Method
from cp_plugin.engine.byol import BYOL
from cp_plugin.engine.decorrelation import BarlowTwins, VICReg
from cp_plugin.engine.dino import DINO
from cp_plugin.engine.moco import MoCoV2
from cp_plugin.engine.simclr import SimCLR
from cp_plugin.engine.simsiam import SimSiam
from cp_plugin.engine.supcon import SupCon
from cp_plugin.engine.supervised import Supervised

METHODS: dict[str, type[Method]] = {
    "simclr": SimCLR,
    "mocov2plus": MoCoV2,
    "byol": BYOL,
    "simsiam": SimSiam,
    "barlow_twins": BarlowTwins,
    "vicreg": VICReg,
    "dino": DINO,
    "supervised": Supervised,
    "supcon": SupCon,
}


def build_method(cfg: DictConfig, image_size: int) -> Method:
    """Build the method of a configuration.

    Args:
        cfg: a configuration from `complete`.
        image_size: side of the views in pixels.

    Raises:
        UserError: the backbone does not exist or cannot be built.
    """
    return METHODS[cfg.method](cfg, image_size)
