"""A defence in the training of a victim, of any host that is a LightningModule."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from cp_plugin.callbacks.base import DEFENCE, Callback, prepare_fit
from cp_plugin.callbacks.batches import labels_of, views_of, with_views
from cp_plugin.callbacks.craft import CraftPoison
from cp_plugin.callbacks.loader_hooks import Exchange, renew, training_loader
from cp_plugin.callbacks.outline import outline
from cp_plugin.config.defences import (
    AdversarialConfig,
    CutoutConfig,
    DpSgdConfig,
    MixupConfig,
    NoiseConfig,
    Settings,
    UeraserConfig,
    check_defence,
    defence_settings,
)
from cp_plugin.config.settings import UserError
from cp_plugin.data import RawDataset, class_names, labels
from cp_plugin.data.canonical import canonical_size
from cp_plugin.data.slots import rebuilt
from cp_plugin.defences import Cutout, GaussianNoise, Mixing, Pixels, adversarial_views
from cp_plugin.defences.eraser import Ueraser, worst_views
from cp_plugin.defences.images import IMAGE_DEFENCES, with_images_changed
from cp_plugin.defences.privacy import Private, require_opacus, with_group_norm
from cp_plugin.hosts import adapt
from cp_plugin.hosts.gradients import momentum_gradients, preserve_state
from cp_plugin.mirror.pipeline import mirror_outline
from cp_plugin.util.random_state import random_state_kept
from cp_plugin.util.seed import run_seed
from cp_plugin.util.undo import Exchanges

Step = Callable[..., Any]
"""A module's `training_step`."""
Defended = Callable[[Step, Any, Any], Any]
"""From the module's own step, a batch and the other arguments, what the step returns."""


class Defence(Callback):
    """Defend a victim: its images, its views, its labels or its gradients.

    Images are changed in the training data set, after a poison and before augmentation; views on
    the module's device, after it.

    Example:
        >>> trainer = Trainer(callbacks=[InjectPoison("poison.safetensors"), Defence("noise")])
    """

    acts_on_images = (DEFENCE,)

    def __init__(self, name: str, config: Settings | None = None, **settings: Any) -> None:
        """Take the settings.

        Args:
            name: of `cp_plugin.config.defences.DEFENCES`, or none.
            config: the settings; None: made of `settings`.
            settings: those of the defence, by name, see `cp_plugin.config.defences`.

        Raises:
            UserError: an unknown name or setting, or a value out of range.
        """
        super().__init__()
        self.name, self.config = name, defence_settings(name, settings, config)
        self._exchanged = Exchanges()
        self._exchange: Exchange | None = None
        self._private: Private | None = None
        self._facts: dict[str, Any] = {}

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Refuse what the method cannot have; make a module ready for private training.

        Raises:
            UserError: the method has no loss that the defence could serve, or the module no place
                for it.
        """
        if stage != "fit":
            return
        prepare_fit(trainer)
        if self.config is None:
            return
        self._check(trainer, pl_module)
        if isinstance(self.config, DpSgdConfig):
            require_opacus()
            with_group_norm(pl_module)

    @random_state_kept()
    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Put the defence in.

        Raises:
            UserError: data set, views or labels do not fit it.
        """
        config, loader = self.config, training_loader(trainer)
        if config is None:
            return
        if isinstance(config, IMAGE_DEFENCES):
            pipeline = RawDataset(loader.dataset, None).transform
            size = canonical_size(loader.dataset, mirror_outline(pipeline).resized_side)
            device = pl_module.device
            changed, facts = with_images_changed(loader.dataset, config, size, device, run_seed())
            self._facts.update(facts)
            self._exchange = Exchange(trainer, changed)
            self._exchanged.callback(self._exchange.restore)
        elif isinstance(config, DpSgdConfig):
            self._make_private(trainer, pl_module, loader, config)
        else:
            self._wrap_step(pl_module, self._defended_step(pl_module, loader.dataset))

    def on_train_batch_start(
        self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int
    ) -> None:
        """Check that the first batch is of the changed images.

        Raises:
            UserError: the loader keeps an iterator of its own.
        """
        if self._exchange is not None:
            self._exchange.check()
            self._exchange = None

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        """Give module and loader their own back."""
        self._exchanged.close()

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        """Give module and loader their own back when training breaks off."""
        self._exchanged.close()

    def on_save_checkpoint(self, trainer: Any, pl_module: Any, checkpoint: dict[str, Any]) -> None:
        """Keep what the privacy accountant has seen."""
        if self._private is not None:
            checkpoint["cp_plugin_privacy"] = self._private.accountant.state_dict()

    def on_load_checkpoint(self, trainer: Any, pl_module: Any, checkpoint: dict[str, Any]) -> None:
        """Go on counting where the checkpoint was saved."""
        self._spent = checkpoint.get("cp_plugin_privacy")

    _spent: dict[str, Any] | None = None

    def facts(self) -> dict[str, Any]:
        """Return what was seen: seconds that completions took, the privacy budget spent."""
        return {**self._facts, **(self._private.facts() if self._private else {})}

    def _check(self, trainer: Any, module: Any) -> None:
        if any(isinstance(callback, CraftPoison) for callback in trainer.callbacks):
            raise UserError(
                f"defence={self.name} belongs to a victim, and this run crafts a poison; craft "
                "without it, then inject the poison into a defended run."
            )
        own = getattr(module, "cfg", None)
        method = getattr(own, "method", None) if own is not None else None
        if method is not None:
            check_defence(self.name, str(method))

    def _make_private(self, trainer: Any, module: Any, loader: Any, config: DpSgdConfig) -> None:
        dataset = loader.dataset
        view_mirror = outline(trainer, module, RawDataset(dataset, None))
        if view_mirror.views != 1:
            check_defence(self.name, type(module).__name__)
        known = labels(dataset)
        if known is None or bool((known < 0).any()):
            raise UserError("defence=dp_sgd needs a label for every image; use labelled data.")
        several = len(trainer.optimizers) != 1 or trainer.accumulate_grad_batches != 1
        if several or trainer.world_size != 1:
            raise UserError(
                "defence=dp_sgd needs one optimizer, one process and accumulate_grad_batches=1."
            )
        steps = int(trainer.estimated_stepping_batches)
        sizes = (len(dataset), int(loader.batch_size or 0), steps)
        private = self._private = Private(module, trainer.optimizers[0], config, *sizes)
        if self._spent is not None:
            private.accountant.load_state_dict(self._spent)
        self._exchanged.attribute(trainer.strategy, "optimizers", [private.optimizer])
        self._exchanged.callback(private.stop)
        sampler = private.sampler(int(trainer.num_training_batches), run_seed())
        # The loader draws by chance until the end; it refuses this by ordinary means.
        self._exchanged.entry(vars(loader), "batch_sampler", sampler)
        renew(trainer, loader)

    def _defended_step(self, module: Any, dataset: Any) -> Defended:
        """Return what takes the module's own step, a batch and the rest, and runs it defended."""
        config = self.config
        if isinstance(config, MixupConfig):
            return self._mixed_step(module, dataset, config)
        if isinstance(config, AdversarialConfig):
            return _Adversary(module, config, self._pixels(module, dataset)).step
        if isinstance(config, UeraserConfig):
            return _Eraser(module, config, self._pixels(module, dataset)).step
        change: GaussianNoise | Cutout
        if isinstance(config, NoiseConfig):
            change = GaussianNoise(config.std, self._pixels(module, dataset))
        else:
            assert isinstance(config, CutoutConfig)
            change = Cutout(config.size)

        def step(own: Step, batch: Any, rest: Any) -> Any:
            return own(with_views(batch, [change(view) for view in views_of(batch)]), *rest)

        return step

    def _mixed_step(self, module: Any, dataset: Any, config: MixupConfig) -> Defended:
        view_mirror = outline(module.trainer, module, RawDataset(dataset, None))
        if getattr(module, "cfg", None) is None and view_mirror.views != 1:
            check_defence(self.name, type(module).__name__)
        known = labels(dataset)
        if known is None:
            raise UserError(f"defence={self.name} mixes labels, and the data set has none.")
        names = class_names(dataset)
        mixing = Mixing(config, len(names) if names else int(known.max()) + 1)

        def step(own: Step, batch: Any, rest: Any) -> Any:
            targets = labels_of(batch)
            views, mixed = mixing(views_of(batch), targets)
            changed = rebuilt(batch, lambda value: mixed if value is targets else value)
            return own(with_views(changed, views), *rest)

        return step

    def _pixels(self, module: Any, dataset: Any) -> Pixels:
        """Return what black and white are in views, as the pipeline normalises them."""
        view_mirror = outline(module.trainer, module, RawDataset(dataset, None))
        shape = (1, 3, 1, 1)
        black, white = (view_mirror.normalize(make(shape))[0] for make in (torch.zeros, torch.ones))
        return Pixels(black, white).to(module.device)

    def _wrap_step(self, module: Any, defended: Defended) -> None:
        own = module.training_step

        @functools.wraps(own)
        def training_step(batch: Any, *rest: Any, **named: Any) -> Any:
            return defended(functools.partial(own, **named), batch, rest)

        self._exchanged.entry(vars(module), "training_step", training_step)


class _Adversary:
    """Runs a module's step on views that raise its loss."""

    def __init__(self, module: Any, config: AdversarialConfig, pixels: Pixels) -> None:
        self._module, self._config, self._pixels = module, config, pixels
        self._host = adapt(module, with_views)

    def step(self, own: Step, batch: Any, rest: Any) -> Any:
        """Move the views in eval mode, the module left as it was; then train on them."""
        views = views_of(batch)
        module = self._module
        with preserve_state(module) as guard:
            if self._host.eval_passes_gradients:
                module.eval()
            gradients = momentum_gradients(module, self._host.momentum_modules())

            def loss(moved: list[Tensor]) -> Tensor:
                with gradients:
                    output = own(with_views(batch, moved), *rest)
                return _loss_in(output)

            moved = adversarial_views(loss, views, self._config, self._pixels, guard.restore)
        return own(with_views(batch, moved), *rest)


class _Eraser:
    """Runs a module's step on changed views, or on the worst of several changes."""

    def __init__(self, module: Any, config: UeraserConfig, pixels: Pixels) -> None:
        self._module, self._config = module, config
        self._change = Ueraser(config.intensity, pixels)

    def step(self, own: Step, batch: Any, rest: Any) -> Any:
        """Draw views; in the worst-case form, compute their losses first and undo all traces."""
        views, config = views_of(batch), self._config
        last = config.worst_epochs
        worst = config.form == "worst" and (last is None or self._module.current_epoch < last)
        count = config.draws if worst else 1
        draws = [[self._change(view) for view in views] for _ in range(count)]
        if count > 1:
            draws = [worst_views(draws, self._losses(own, batch, rest, draws))]
        return own(with_views(batch, draws[0]), *rest)

    def _losses(self, own: Step, batch: Any, rest: Any, draws: list[list[Tensor]]) -> list[Tensor]:
        of_images = getattr(self._module, "image_losses", None)
        losses = []
        with preserve_state(self._module) as guard, torch.no_grad():
            for views in draws:
                shown = with_views(batch, views)
                losses.append(of_images(shown) if of_images else _loss_in(own(shown, *rest)))
                guard.restore()
        return losses


def _loss_in(output: Any) -> Tensor:
    value = output["loss"] if isinstance(output, Mapping) else output
    assert isinstance(value, Tensor)
    return value
