"""A poison that is crafted as a contrastive one, and whose classes lie apart."""

from __future__ import annotations

from torch import Tensor

from cp_plugin.attack.loop import Term
from cp_plugin.attack.separability import class_separability
from cp_plugin.callbacks.craft import CraftPoison
from cp_plugin.config.baselines import TueConfig
from cp_plugin.config.settings import UserError
from cp_plugin.data.batch import Batch


class CraftTue(CraftPoison):
    """Craft a contrastive poison whose deltas lie close to those of their class.

    The surrogate reads no labels; they come from the data set.

    Source: Ren et al., "Transferable Unlearnable Examples", ICLR 2023.
    """

    kind = "tue"
    serves_streams = False
    config_class = TueConfig

    def term(self) -> Term:
        """Return the weighted discriminant of the deltas of a batch.

        Raises:
            UserError: the data set has no labels.
        """
        config, crafting = self.config, self.crafting
        assert isinstance(config, TueConfig)
        labels = crafting.labels
        if labels is None or not bool((labels >= 0).any()):
            raise UserError(
                "poison=tue tells classes apart and this data set has no labels; use labelled data "
                "or +poison=cp."
            )

        def discriminant(delta_BCHW: Tensor, batch: Batch) -> Tensor:
            of_images = crafting.attack.rows.of_image[batch.rows]
            known = labels[batch.rows].where(of_images >= 0, -1)  # the others carry no delta
            separability = class_separability(delta_BCHW, known.to(delta_BCHW.device))
            return config.separability * separability

        return discriminant
