"""Contrastive poisoning: the two phases, for any host (He, Zha, Katabi, ICLR 2023, algorithm 1).

    min over delta, min over theta: E_x [ L_CL( T1(x + d(x)), T2(x + d(x)); theta ) ],  |d| <= eps

Both phases minimise the host's own SSL loss. The model phase is the host's own training on
poisoned, mirrored views; the noise phase, written here, keeps the weights and moves delta. It asks
for each loss: a host answers with its own, or the body of a user's loop does.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from cp_plugin.attack.perturbation import Perturbation
from cp_plugin.attack.rows import Rows
from cp_plugin.config.settings import AlternationConfig, Fit, UserError
from cp_plugin.data.batch import Batch
from cp_plugin.data.fit import keeping_grey
from cp_plugin.hosts.gradients import check_momentum_gradients, momentum_gradients, preserve_state
from cp_plugin.hosts.modes import hold_still
from cp_plugin.hosts.protocol import Host, LossRequest, LossRequests, answer
from cp_plugin.hosts.running import RunningMomentum
from cp_plugin.mirror import Mirror
from cp_plugin.mirror.survival import survived
from cp_plugin.util.internals import without_torch_functions
from cp_plugin.util.processes import gathered, share, summed
from cp_plugin.util.seed import derived_seed

Term = Callable[[Tensor, Batch], Tensor]
"""From the deltas of a batch's images, float (B, C, H, W), and the batch to a scalar."""


@dataclass
class Schedule:
    """Rounds of M optimiser steps of the surrogate and N batches of the noise phase."""

    rounds: int
    model_steps: int
    noise_steps: int
    """0: there is no noise phase, the model phase moves delta."""
    pgd_steps: int
    steps_done: int = 0
    """Optimiser steps of the surrogate so far."""
    clean_steps: int = 0
    """The first of them, whole rounds: the surrogate learns from clean images, delta rests."""

    @property
    def total_steps(self) -> int:
        """Optimiser steps of the surrogate in all rounds."""
        return self.rounds * self.model_steps

    @property
    def finished(self) -> bool:
        """True once the last model phase is over."""
        return self.steps_done >= self.total_steps

    @property
    def noise_steps_done(self) -> int:
        """Sign-gradient steps so far, each on a batch; of a joint schedule, its model steps."""
        done = max(0, self.steps_done - self.clean_steps)
        if self.noise_steps == 0:
            return done
        return done // self.model_steps * self.noise_steps * self.pgd_steps

    def model_step(self) -> bool:
        """Count an optimiser step; return True when a noise phase is due."""
        self.steps_done += 1
        if self.noise_steps == 0 or self.steps_done <= self.clean_steps:
            return False
        return self.steps_done % self.model_steps == 0

    def image_passes(self, batch_size: int, views: int) -> int:
        """Return how many images go forward and backward through the network in all rounds."""
        noisy = self.rounds - self.clean_steps // self.model_steps
        noise = noisy * self.noise_steps * self.pgd_steps
        return (self.rounds * self.model_steps + noise) * batch_size * views


@dataclass
class _Step:
    """One step of the noise phase."""

    delta: Tensor
    """float32 (U, C, H, W), a leaf."""
    gradient: Tensor | None = None
    """Of all losses that were shown, with respect to delta."""
    loss: Tensor | None = None
    """Their sum."""
    fault: UserError | None = None
    """Why a loss does not fit; another one of the step may."""


def poisoned(images_BCHW: Tensor, delta_BCHW: Tensor, fit: Fit = "crop") -> Tensor:
    """Return uint8 images plus delta as float32 in [0, 1]; with `cover` grey ones stay grey."""
    if fit == "cover":
        delta_BCHW = keeping_grey(delta_BCHW, images_BCHW)
    return (images_BCHW.float().div_(255) + delta_BCHW).clamp(0, 1)


class Attack:
    """The perturbation of one data set and what moves it."""

    def __init__(
        self,
        host: Host,
        mirror: Mirror,
        perturbation: Perturbation,
        rows: Rows,
        config: AlternationConfig,
        seed: int,
        aspects: Tensor | None = None,
    ) -> None:
        """Bind the parts.

        Args:
            host: the method whose loss is minimised.
            mirror: the differentiable counterpart of its augmentations.
            perturbation: the rows of delta.
            rows: which row belongs to which image.
            config: T, the step size and whether gradients pass a momentum branch are read from it.
            seed: seeds the augmentations; together with a step's number it fixes them.
            aspects: float64 (N), width over height of each image where all of it was squeezed into
                the shape of delta (`fit: cover`): crops are drawn as of the image itself.
        """
        self.aspects = aspects
        self.host, self.mirror, self.perturbation = host, mirror, perturbation
        self.rows, self.config, self.seed = rows, config, seed
        self._generator = torch.Generator()
        momentum = host.momentum_modules() if config.uses_dual_branch else ()
        if config.joint and momentum:
            raise UserError(
                "poison.schedule=joint cannot open a momentum branch, whose weights move in the "
                "same step; add poison.dual_branch=false, or use poison.schedule=alternate."
            )
        self._gradients = momentum_gradients(host.module, momentum)
        self._checked = False
        self.scaled: Callable[[Tensor], Tensor] = lambda loss: loss
        """Makes a loss large enough for gradients in float16; their signs alone are used."""
        self.term: Term | None = None
        """What a noise phase minimises of delta itself, beside the host's loss of the views."""
        self.moved = False
        """Whether any gradient has reached delta."""

    def views(self, batch: Batch, step: int) -> list[Tensor]:
        """Return the poisoned, mirrored views of a batch for the host's own training step.

        With a joint schedule the backward pass of that step moves delta.

        Args:
            batch: on the host's device.
            step: batches of the model phase so far; fixes the augmentations that are drawn.
        """
        rows_U, inverse_B = self._rows_of(batch)
        with torch.set_grad_enabled(self.config.joint):
            delta = self.perturbation.gather(rows_U, batch.images.device)
            if self.config.joint:
                delta.requires_grad_().register_hook(  # type: ignore[no-untyped-call]
                    lambda gradient: self._descend(rows_U, gradient, "model", step)
                )
            images = poisoned(batch.images, delta[inverse_B], self.config.fit)
            return self._mirrored(images, batch, "model", step)

    def noise_phase(self, batches: Iterable[Batch], step: int) -> list[Tensor]:
        """Optimise delta on each batch down the host's own loss, see `noise_requests`.

        Returns:
            The mean loss of each batch.
        """
        losses: list[Tensor] = []
        answer(self.noise_requests(batches, step, losses), self.host)
        return losses

    def noise_requests(
        self, batches: Iterable[Batch], step: int, losses: list[Tensor]
    ) -> LossRequests:
        """Optimise delta on each batch, weights fixed, down losses that are asked for.

        The host is in eval mode meanwhile and is left bit for bit as it was found, but for queue
        and momentum branch where `momentum_during_noise` lets them run.

        Args:
            batches: N batches on the host's device.
            step: optimiser steps of the surrogate so far; fixes the augmentations that are drawn.
            losses: gets the mean loss of each batch.
        """
        with self._weights_fixed() as restore:
            for number, batch in enumerate(batches):
                yield from self._noise_batch(batch, (step, number), restore, losses)

    def check_moved(self, where: str) -> None:
        """Check, after the backward pass of a joint step, that it has moved delta.

        Args:
            where: what computes the loss, for the error.

        Raises:
            UserError: it has not.
        """
        if self.config.joint and not self.moved:
            raise UserError(
                f"poison.schedule=joint found no gradient from the loss to the views: {where} "
                "detaches them, or computes its loss without a graph; use "
                "poison.schedule=alternate, which says more."
            )

    @contextmanager
    def _weights_fixed(self) -> Iterator[Callable[[], None]]:
        """Keep the host as it is during a noise phase; gives what undoes the traces of a step."""
        running = RunningMomentum(self.host) if self.config.runs_momentum else None
        with preserve_state(self.host.module) as guard:
            hold_still(self.host.module)
            yield guard.restore if running is None else running.kept(guard.restore)
            if running is not None:
                running.take()
        if running is not None:
            running.put()

    def _noise_batch(
        self,
        batch: Batch,
        at: tuple[int, int],
        restore: Callable[[], None],
        losses: list[Tensor],
    ) -> LossRequests:
        rows_U, inverse_B = self._rows_of(batch)
        found = []
        for pgd_step in range(self.config.pgd_steps):
            delta = self.perturbation.gather(rows_U, batch.images.device).requires_grad_()
            images = poisoned(batch.images, delta[inverse_B], self.config.fit)
            views = self._mirrored(images, batch, "noise", *at, pgd_step)
            step = _Step(delta)
            with self._gradients:
                yield LossRequest(views, batch, functools.partial(self._on_loss, step))
            if self.term is not None and step.gradient is not None:
                self._on_loss(step, self.term(delta[inverse_B], batch))
            restore()
            hold_still(self.host.module)  # a step that takes features sets flags as it likes
            if step.fault is not None and not self._checked:
                raise step.fault
            if step.loss is not None:
                self._check_finite(step.loss, *at, pgd_step)
                found.append(step.loss)
            if step.gradient is None and share().processes > 1:
                step.gradient = torch.zeros_like(delta)  # the other processes wait for this one
            if step.gradient is not None:
                self._descend(rows_U, step.gradient, "noise", *at, pgd_step)
        if found:
            losses.append(torch.stack(found).mean())

    def _on_loss(
        self,
        step: _Step,
        loss: Tensor,
        weight: Tensor | None = None,
        retain_graph: bool = False,
    ) -> None:
        """Add the gradient of a loss, by which delta then moves."""
        if not self._checked:
            try:
                self._checked = check_momentum_gradients(self._gradients, loss, step.delta)
            except UserError as fault:
                step.fault = fault
        if not loss.requires_grad:  # of a part that is trained beside, on what is detached
            return
        with without_torch_functions():  # meanwhile detach may do nothing
            value = loss.detach().float()
            if loss.ndim and weight is not None:
                value = value * weight
            value = value.sum()
        asked = self.scaled(loss) if weight is None else loss
        (gradient,) = torch.autograd.grad(
            asked, step.delta, weight, retain_graph=retain_graph, allow_unused=True
        )
        if gradient is None:
            return
        step.gradient = gradient if step.gradient is None else step.gradient + gradient
        step.loss = value if step.loss is None else step.loss + value

    def _check_finite(self, loss: Tensor, model_steps: int, number: int, pgd_step: int) -> None:
        """Check the loss of a noise step: one that is not finite has no direction.

        On an accelerator no step of a phase is waited for; `Crafting` checks their mean.

        Raises:
            UserError: it is not finite.
        """
        if loss.device.type == "cpu" and not bool(torch.isfinite(loss).all()):
            raise UserError(
                f"the loss of {self.host.method} in the noise phase after model step "
                f"{model_steps}, batch {number + 1}, step {pgd_step + 1}, is "
                f"{float(loss.float().mean())}, so the surrogate has diverged and no poison is "
                "written; lower its learning rate or train it in a higher precision."
            )

    def _rows_of(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Return the rows of all processes' images, once each, and where each own image's is.

        The rows are on the CPU, the places on the device of the images.
        """
        rows = self.rows.of_batch(batch)
        self.rows.provide(self.perturbation)
        rows_U, inverse = torch.unique(rows, return_inverse=True)
        places_B = inverse[share().positions(len(batch.images))]
        return rows_U, places_B.to(batch.images.device, non_blocking=True)

    def _descend(self, rows_U: Tensor, gradient: Tensor, phase: str, *place: int) -> None:
        """Move rows; where they do seeds the rounding, so that no state of it is kept."""
        step = self.config.step_size * self.config.eps
        seed = derived_seed(self.seed, f"rounding, {phase}", *place)
        self.perturbation.descend(rows_U, summed(gradient), step, seed)
        self.moved = True

    def _mirrored(self, images: Tensor, batch: Batch, phase: str, *place: int) -> list[Tensor]:
        self._generator.manual_seed(derived_seed(self.seed, phase, *place))
        aspects_B = None if self.aspects is None else self.aspects[gathered(batch.rows)]
        own = share()
        if own.processes == 1:
            return self._views_of(images, aspects_B)
        # Parameters are drawn for the images of all processes at once: an image gets the same ones
        # however many there are. Blank images stand for those of the others.
        places = own.positions(len(images))
        whole = images.new_zeros(len(images) * own.processes, *images.shape[1:])
        whole[places] = images
        return [view[places] for view in self._views_of(whole, aspects_B)]

    def _views_of(self, images: Tensor, aspects_B: Tensor | None) -> list[Tensor]:
        arrived = survived(images, self.config.survive, self._generator)
        views: list[Tensor] = self.mirror(arrived, self._generator, aspects=aspects_B)
        return views
