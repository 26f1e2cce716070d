"""Poisons for a plain PyTorch loop: craft one with the loop that is there, add one to a data set.

The loop's own body computes the loss, in the noise phase too: `PoisonLoop` stands where the data
loader stood and hands out batches, and while a batch belongs to the noise phase it holds the
weights, opens the momentum branch and takes the gradient of the loss that `backward` is given.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader

from cp_plugin.attack import snapshot
from cp_plugin.attack.crafting import Crafting
from cp_plugin.attack.images import raw_and_mirror
from cp_plugin.attack.inject import inject
from cp_plugin.attack.poison_file import Poison
from cp_plugin.attack.row_file import RowFile
from cp_plugin.attack.start import taken_up
from cp_plugin.attack.stream_rows import NewRows
from cp_plugin.attack.stream_start import taken_up_on_stream
from cp_plugin.config.settings import CacheMode, CraftConfig, UserError, build, cache_mode
from cp_plugin.data import PreTransformDataset, PreTransformStream
from cp_plugin.data.batch import Batch
from cp_plugin.data.loading import (
    batch_size_of,
    batches_of,
    check_batched,
    moved,
    raw_loader,
    unwrapped,
)
from cp_plugin.data.order import Endless
from cp_plugin.data.read_once import read_once
from cp_plugin.evaluation.clusters import put_into_clusters
from cp_plugin.hosts.checks import check_module, tell_uncompared
from cp_plugin.hosts.module import ModuleHost
from cp_plugin.hosts.observe import named_networks
from cp_plugin.hosts.protocol import LossRequest, LossRequests
from cp_plugin.util.internals import without_torch_functions
from cp_plugin.util.processes import share
from cp_plugin.util.seed import run_seed

log = logging.getLogger("cp_plugin")

MODEL = "model"
"""What the first module of a loop is called, where there are several."""


def poisoned(
    dataset: Any, poison: Poison | str | Path, fraction: float = 1.0
) -> PreTransformDataset | PreTransformStream:
    """Return a data set whose images carry a poison before its own transform: a victim's data.

    Args:
        dataset: a data set or stream of images (PIL, array or tensor); it stays as it is.
        poison: the poison or its file.
        fraction: part of the poison's rows that is used, in (0, 1].

    Raises:
        UserError: the poison belongs to other images (the first missing ones are named) or classes,
            or its file is missing or damaged.

    Example:
        >>> dataset = poisoned(LightlyDataset("images", transform=transform), "poison.safetensors")
    """
    return inject(dataset, poison if isinstance(poison, Poison) else Poison.load(poison), fraction)


class PoisonLoop:
    """Craft a contrastive poison inside a training loop written by hand.

    It is iterated where the data loader was, and `poison.backward(loss)` stands where
    `loss.backward()` did. Every batch is one of the loader's own, its views made by the mirror of
    the data set's transform from poisoned images, on the device of the model. The body of the loop
    is used as it stands, for both phases: `backward` trains the surrogate in the model phase and
    moves the perturbation in the noise phase, in which the optimizer has no gradients to step with,
    networks are in eval mode, and what the body changes in the modules is undone. What must count
    in the model phase alone (a scheduler's step for each batch, sums of losses, the steps of a
    GradScaler) asks `model_phase`.

    Example (SimCLR; five lines differ from the loop without a poison):
        >>> poison = PoisonLoop(dataloader, model, criterion, rounds=200)
        >>> for epoch in range(400):
        ...     for batch in poison:
        ...         x0, x1 = batch[0]
        ...         loss = criterion(model(x0), model(x1))
        ...         poison.backward(loss)
        ...         optimizer.step()
        ...         optimizer.zero_grad()
        >>> poison.save("poison.safetensors")

    Source: He, Zha, Katabi, "Indiscriminate Poisoning Attacks on Unsupervised Contrastive
    Learning", ICLR 2023.
    """

    def __init__(
        self,
        dataloader: DataLoader[Any],
        model: nn.Module,
        *others: nn.Module,
        cache: CacheMode = "auto",
        **settings: Any,
    ) -> None:
        """Open the data set and draw the perturbation.

        Args:
            dataloader: of a map-style data set with the augmentation as its `transform`.
            model: the networks; momentum networks too.
            others: other modules that the body changes: a loss with a memory bank, a second
                network.
            cache: whether images are read once, see `cp_plugin.data.read_once`.
            settings: those of `cp_plugin.config.settings.CraftConfig`, by name. A model step is one
                run of the body.

        Raises:
            UserError: an unknown setting, or a data set that streams or has no mirror.
        """
        dataloader = unwrapped(dataloader)
        if not isinstance(dataloader, DataLoader):
            raise UserError(
                f"PoisonLoop expected a torch DataLoader first, got {type(dataloader).__name__}."
            )
        check_batched(dataloader)
        self._check_modules((model, *others))
        config = build(CraftConfig, settings)
        if config.restarts:
            raise UserError(
                "PoisonLoop does not know how the body makes its optimizer, so it cannot begin a "
                "surrogate anew: leave restarts out, and hand the poison on by init=FILE."
            )
        method = type(model).__name__
        self._raw, view_mirror = raw_and_mirror(dataloader.dataset, config)
        read_once(self._raw, cache_mode(cache), dataloader)
        module = _Together(model, others) if others else model
        check_module(module)
        if view_mirror.views == 1:
            tell_uncompared(method)
        self._host = ModuleHost(module, method, _full_names(module, config.momentum_modules))
        self._loader = raw_loader(dataloader, self._raw)
        self._batches = Endless(self._loader)
        seed = run_seed() if config.seed is None else config.seed
        folder = Path(config.dir or ".")
        self._crafting = Crafting(self._host, view_mirror, self._raw, config, seed, folder)
        self._crafting.plan(batches_of(dataloader))
        self._crafting.announce(batch_size_of(dataloader))
        self._folder = folder
        self._momentum_known = False
        self._model_batches = 0
        self._request: LossRequest | None = None
        self._shown = False
        self.model_phase = True
        """Whether the body trains the surrogate just now, rather than the perturbation."""
        self.losses: list[float] = []
        """Mean loss of each noise phase so far."""

    def __len__(self) -> int:
        """Return how many batches of the model phase an epoch has."""
        return len(self._loader)

    def __iter__(self) -> Iterator[Any]:
        """Yield an epoch's batches, those of the noise phases between them.

        Nothing comes any more once all rounds are done.

        Raises:
            UserError: the body does not call `backward`, or its loss does not fit (see
                `CraftPoison`).
        """
        schedule = self._crafting.schedule
        for raw in self._loader:
            if schedule.finished:
                return
            batch = self._moved(raw)
            if self._crafting.config.joint and not self._momentum_known:
                yield from self._detect_momentum(batch)
            self._shown = self._model_batches > 0  # later on a body may leave a batch out
            yield self._raw.with_views(batch.sample, self._views(batch))
            self._check_shown()
            self._crafting.attack.check_moved("the body of the loop")
            self._model_batches += 1
            noisy = schedule.model_step()
            if self._crafting.awaits_clusters:
                put_into_clusters(self._crafting)
            if noisy:
                yield from self._noise_phase(batch)

    def backward(
        self, loss: Tensor, backward: Callable[..., Any] | None = None, **options: Any
    ) -> None:
        """Call in place of `loss.backward()`: in the model phase it is that very call.

        In the noise phase no parameter gets a gradient; that of the perturbation is taken.

        Args:
            loss: the loss, scaled (`scaler.scale(loss)`) or not. It is reported in `losses` as it
                is given.
            backward: what runs the backward pass where it is not `loss.backward()`:
                `accelerator.backward`, `fabric.backward`,
                `lambda loss: scaler.scale(loss).backward()`. The loss that it is given is
                reported, free of the scale that it uses.
            options: those of `Tensor.backward`, or of `backward`.

        Raises:
            UserError: in the model phase the loss is not a number.
        """
        self._shown = True
        run = Tensor.backward if backward is None else backward
        if self._request is None:
            # A scaled loss may overflow, which its scaler mends; what is not a number stays so.
            self._crafting.check_loss(torch.nan_to_num(loss.detach(), torch.nan, 0.0, 0.0))
            run(loss, **options)
            return
        on_loss, retain = self._request.on_loss, bool(options.get("retain_graph", False))
        # Whatever runs the backward pass gets a leaf in place of the loss. What arrives there is
        # the loss's weight, and the pass itself runs where the framework expects it.
        with without_torch_functions():
            leaf = loss.detach().requires_grad_()
        leaf.register_hook(lambda weight: on_loss(loss, weight, retain))  # type: ignore[no-untyped-call]
        run(leaf, **{name: value for name, value in options.items() if name != "inputs"})

    @property
    def finished(self) -> bool:
        """Whether all rounds are done."""
        return self._crafting.schedule.finished

    def poison(self) -> Poison:
        """Return the poison as it stands."""
        return self._crafting.poison(whole=True)

    def save(self, path: str | Path = "poison.safetensors") -> Path:
        """Write the poison file; a relative path starts at the setting `dir`.

        Raises:
            UserError: the file exists, or the perturbation has not moved.
        """
        return self._crafting.finish().save(self._folder / path)

    def state_dict(self) -> dict[str, Any]:
        """Return what is needed to go on later, beside the states of model and optimizer.

        A perturbation too large for memory stays in `dir`, where the two newest states of it are
        kept; one process of several keeps them.
        """
        perturbation = self._crafting.attack.perturbation
        state: dict[str, Any] = {
            "steps_done": self._crafting.schedule.steps_done,
            "facts": self._crafting.facts,
            "model_batches": self._model_batches,
        }
        others = self._crafting.tensors()
        if isinstance(perturbation.rows, RowFile):
            if share().rank > 0:
                return state
            saved = snapshot.save(self._folder, self._model_batches, perturbation, others)
            return {**state, "snapshot": saved}
        tensors = {"delta": perturbation.rows, **others}
        return {**state, "tensors": {name: t.clone() for name, t in tensors.items()}}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a state; call before the first epoch.

        Raises:
            UserError: it is the state of another data set or of other settings.
        """
        attack = self._crafting.attack
        mine, home = {"delta", *self._crafting.tensors()}, attack.perturbation.rows
        if "snapshot" in state:
            theirs = snapshot.load([self._folder], state["snapshot"])
        else:
            theirs = {name: tensor.clone() for name, tensor in state["tensors"].items()}
        # States of earlier versions do not tell which rows have moved.
        theirs.setdefault("moved", torch.ones_like(attack.perturbation.moved))
        grouped = theirs.keys() - mine if "clusters" in theirs else set()
        if not isinstance(attack.rows, NewRows) and (
            mine | grouped != theirs.keys() or home.shape != theirs["delta"].shape
        ):
            raise UserError(
                f"the state holds delta of shape {tuple(theirs['delta'].shape)}, this loop needs "
                f"{tuple(home.shape)}; use the same data set and settings."
            )
        attack.perturbation = (
            taken_up_on_stream(theirs, attack.rows, self._crafting.config, self._folder)
            if isinstance(attack.rows, NewRows)
            else taken_up(theirs, self._crafting.config, self._folder)
        )
        if isinstance(home, Tensor):
            attack.perturbation.move(home.device)
        else:
            home.remove()
        keys = theirs.get("keys")
        if isinstance(keys, Tensor) and not isinstance(attack.rows, NewRows):
            attack.rows.restore(keys)
        self._crafting.regroup(theirs, state.get("facts", {}))
        self._crafting.schedule.steps_done = int(state["steps_done"])
        self._model_batches = int(state["model_batches"])

    def _views(self, batch: Batch) -> list[Tensor]:
        return self._crafting.attack.views(batch, self._model_batches)

    def _detect_momentum(self, batch: Batch) -> Iterator[Any]:
        """Let the body show, on one batch, what its momentum branch is and what reads labels."""
        self.model_phase = False
        try:
            views = [view.detach() for view in self._views(batch)]
            labels = self._crafting.labels_of(batch)
            detecting = self._host.branch.detecting(self._host.method, views, batch, labels)
            yield from self._answered(detecting)
            self._momentum_known = self._host.branch.known
            self._crafting.rebind()
        finally:
            self.model_phase = True

    def _noise_phase(self, batch: Batch) -> Iterator[Any]:
        if not self._momentum_known:
            yield from self._detect_momentum(batch)
        self.model_phase = False
        try:
            schedule, losses = self._crafting.schedule, list[Tensor]()
            raw = (next(self._batches) for _ in range(schedule.noise_steps))
            yield from self._answered(
                self._crafting.noise_requests(map(self._moved, raw), schedule.steps_done, losses)
            )
            self.losses.append(float(torch.stack(losses).mean()))
            log.info("noise phase %d: loss %.5f", len(self.losses), self.losses[-1])
        finally:
            self.model_phase = True

    def _answered(self, requests: LossRequests) -> Iterator[Any]:
        """Let the body of the loop compute the losses that are asked for."""
        with closing(requests), ExitStack() as open_requests:  # type: ignore[type-var]
            open_requests.callback(setattr, self, "_request", None)
            for request in requests:
                self._request, self._shown = request, False
                with self._host.branch.readers_detached(), _without_sync(self._host.module):
                    yield self._raw.with_views(request.batch.sample, request.views)
                self._check_shown()

    def _check_shown(self) -> None:
        if not self._shown:
            raise UserError(
                "PoisonLoop expected the body of the loop to call poison.backward(loss) for every "
                "batch, but it came back without; call it where loss.backward() was."
            )

    def _moved(self, batch: Batch) -> Batch:
        return moved(batch, self._host.device)

    def _check_modules(self, modules: Sequence[Any]) -> None:
        for module in modules:
            if not isinstance(module, nn.Module):
                raise UserError(
                    f"PoisonLoop expected modules after the loader, got {type(module).__name__}; "
                    "pass the model, and losses that keep a memory bank."
                )


class _Together(nn.Module):
    """The modules of a loop as one."""

    def __init__(self, model: nn.Module, others: Sequence[nn.Module]) -> None:
        super().__init__()
        self.add_module(MODEL, model)
        for number, other in enumerate(others):
            self.add_module(f"other{number}", other)


def _full_names(module: nn.Module, names: str | Sequence[str]) -> str | Sequence[str]:
    """Return names as they are in the whole; those of the model's own networks need no prefix."""
    if names == "auto":
        return names
    known = named_networks(module)
    wanted = [names] if isinstance(names, str) else names
    return [f"{MODEL}.{name}" if f"{MODEL}.{name}" in known else name for name in wanted]


def _without_sync(module: nn.Module) -> ExitStack:
    """Return a context in which DDP waits for no gradients: its weights get none."""
    stack = ExitStack()
    for part in module.modules():
        if isinstance(part, DistributedDataParallel):
            stack.enter_context(part.no_sync())
    return stack
