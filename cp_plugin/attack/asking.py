"""The attack for a loss that is computed by somebody else: a training loop written by hand."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from cp_plugin.attack.crafting import Crafting
from cp_plugin.attack.loop import Attack, poisoned
from cp_plugin.data.batch import Batch
from cp_plugin.hosts.gradients import check_momentum_gradients
from cp_plugin.hosts.observe import LossRequest, LossRequests


class RequestingAttack(Attack):
    """The attack, for a loss that is computed by somebody else."""

    def requests(self, batches: Iterator[Batch], step: int, losses: list[Tensor]) -> LossRequests:
        """Optimise delta on each batch, as `noise_phase` does; fills in the losses."""
        with self._weights_fixed() as restore:
            for number, batch in enumerate(batches):
                yield from self._asking_batch(batch, (step, number), restore, losses)

    def _asking_batch(
        self,
        batch: Batch,
        at: tuple[int, int],
        restore: Callable[[], None],
        losses: list[Tensor],
    ) -> LossRequests:
        rows_U, inverse_B = self._rows_of(batch)
        for pgd_step in range(self.config.pgd_steps):
            delta = self.perturbation.gather(rows_U, batch.images.device).requires_grad_()
            gradient = torch.zeros_like(delta)
            images = poisoned(batch.images, delta[inverse_B])
            views = self._mirrored(images, "noise", *at, pgd_step)

            def on_loss(loss: Tensor, delta: Tensor = delta, gradient: Tensor = gradient) -> None:
                if not self._checked:
                    self._checked = check_momentum_gradients(self._gradients, loss, delta)
                # The body may call backward for each of several losses.
                gradient.add_(torch.autograd.grad(loss, delta, retain_graph=True)[0])
                with torch._C.DisableTorchFunction():  # while gradients, detach may do nothing
                    losses.append(loss.detach().float())

            with self._gradients:
                yield LossRequest(views, batch, on_loss)
            restore()
            if losses:
                self._check_finite(losses[-1], *at, pgd_step)
            self.perturbation.descend(rows_U, gradient, self.config.step_size * self.config.eps)


class RequestingCrafting(Crafting):
    """A poison in the making, its losses computed by somebody else."""

    attack_class = RequestingAttack
    attack: RequestingAttack
