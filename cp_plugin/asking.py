"""The attack for a loss that is computed by somebody else: a training loop written by hand."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from cp_plugin.adapters.observation import Ask, Asking
from cp_plugin.attack import Attack, poisoned
from cp_plugin.crafting import Crafting
from cp_plugin.host import Batch
from cp_plugin.release import check_release, untouched


class AskingAttack(Attack):
    """The attack, for a loss that is computed by somebody else."""

    def asking(self, batches: Iterator[Batch], step: int, losses: list[Tensor]) -> Asking:
        """Optimise delta on each batch, as `noise_phase` does; fills in the losses."""
        with untouched(self.host.module) as found:
            self.host.module.eval()
            for number, batch in enumerate(batches):
                yield from self._asking_batch(batch, (step, number), found.restore, losses)

    def _asking_batch(
        self,
        batch: Batch,
        at: tuple[int, int],
        restore: Callable[[], None],
        losses: list[Tensor],
    ) -> Asking:
        rows_U, inverse_B = self._rows_of(batch)
        for pgd_step in range(self.config.pgd_steps):
            delta = self.perturbation.gather(rows_U, batch.images.device).requires_grad_()
            gradient = torch.zeros_like(delta)
            images = poisoned(batch.images, delta[inverse_B])
            views = self._mirrored(images, "noise", *at, pgd_step)

            def look(loss: Tensor, delta: Tensor = delta, gradient: Tensor = gradient) -> None:
                if not self._checked:
                    self._checked = check_release(self._release, loss, delta)
                # The body may call backward for each of several losses.
                gradient.add_(torch.autograd.grad(loss, delta, retain_graph=True)[0])
                with torch._C.DisableTorchFunction():  # while released, detach may do nothing
                    losses.append(loss.detach().float())

            with self._release:
                yield Ask(views, batch, look)
            restore()
            self.perturbation.descend(rows_U, gradient, self.config.step_size * self.config.eps)


class AskingCrafting(Crafting):
    """A poison in the making, its losses computed by somebody else."""

    attack_class = AskingAttack
    attack: AskingAttack
