"""Poisons made on a supervised surrogate: error-minimising noise and adversarial poisoning."""

from __future__ import annotations

import logging
from typing import Any

from torch import Tensor
from torch.utils.data import DataLoader

from cp_plugin.attack.loop import Schedule, Term
from cp_plugin.callbacks.base import prepare_fit
from cp_plugin.callbacks.craft import CraftPoison
from cp_plugin.callbacks.loader_hooks import training_loader
from cp_plugin.config.baselines import (
    AapConfig,
    AueConfig,
    ErrorMinConfig,
    PilConfig,
    SepConfig,
    TapConfig,
    TrainedSurrogateConfig,
)
from cp_plugin.config.settings import AlternationConfig, CacheMode, UserError, given
from cp_plugin.data import RawDataset, RawStream, class_names, labels
from cp_plugin.data.loading import batch_size_of, moved
from cp_plugin.hosts.lightning import LightningHost
from cp_plugin.hosts.supervised import (
    AdversarialHost,
    EnsembleHost,
    LinearisingHost,
    SupervisedHost,
)

log = logging.getLogger("cp_plugin")


class CraftErrorMin(CraftPoison):
    """Craft error-minimising noise while a LightningModule learns classes as the surrogate.

    The alternation of `CraftPoison` with a supervised loss in place of the self-supervised one:
    noise that makes the labels easy leaves nothing to learn. Augmentations are differentiated
    through; the paper crafts without any (`augmentations` of one resize).

    Source: Huang et al., "Unlearnable Examples: Making Personal Data Unexploitable", ICLR 2021.
    """

    config_class: type[AlternationConfig] = ErrorMinConfig
    kind = "error_min"
    serves_streams = False
    host_class: type[SupervisedHost] = SupervisedHost

    def adapted(self, trainer: Any, pl_module: Any, raw: RawDataset | RawStream) -> LightningHost:
        """Return the surrogate as a supervised host.

        Raises:
            UserError: the data set has no labels.
        """
        known = labels(raw.dataset)
        if known is None or not bool((known >= 0).any()):
            raise UserError(
                f"a poison made on a supervised surrogate ({self.kind}) needs "
                "labelled images and this data set has no labels; use labelled data or +poison=cp."
            )
        context = trainer.precision_plugin.train_step_context
        return self.host_class(pl_module, raw.with_views, (), context, trainer)


class CraftAue(CraftErrorMin):
    """Craft error-minimising noise through contrastive augmentations, in whole epochs.

    The augmentations are those of the module's own loader; `configs/poison/aue.yaml` has
    contrastive ones, weakened.

    Source: Wang, Zhu, Gao, "Efficient Availability Attacks against Supervised and Contrastive
    Learning Simultaneously", NeurIPS 2024.
    """

    kind = "aue"
    config_class = AueConfig


class CraftOnTrained(CraftErrorMin):
    """Train a LightningModule on clean images, then move all images by T steps at once.

    The module trains as its trainer says; the steps are made when training ends, each on an
    augmentation drawn anew, on the trained network in eval mode.
    """

    config_class = AlternationConfig
    settings_class: type[TrainedSurrogateConfig]
    """The settings that a user gives, of which `config` is made."""

    def __init__(
        self,
        config: TrainedSurrogateConfig | None = None,
        cache: CacheMode = "auto",
        **settings: Any,
    ) -> None:
        """Take the settings.

        Args:
            config: the settings; None: made of `settings`.
            cache: whether images are read once, see `cp_plugin.data.read_once`.
            settings: those of `settings_class`, by name.

        Raises:
            UserError: an unknown name or a value out of range.
        """
        self._chosen = given(self.settings_class, config, settings)
        super().__init__(self._chosen.alternation(), cache)
        self._misled = False

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Let training end where it would."""
        if stage == "fit":
            prepare_fit(trainer)
        self._trainer = trainer

    def adapted(self, trainer: Any, pl_module: Any, raw: RawDataset | RawStream) -> LightningHost:
        """Return the surrogate as the host that shows what is minimised.

        Raises:
            UserError: the data set has no labels, or there are several processes.
        """
        if trainer.world_size > 1:
            raise UserError(
                f"{self.kind} is crafted by one process, got {trainer.world_size}; set devices=1."
            )
        return super().adapted(trainer, pl_module, raw)

    def plan(self, trainer: Any, loader: DataLoader[Any]) -> None:
        """One round: all steps of training, then every image once."""
        steps = max(1, int(trainer.estimated_stepping_batches))
        batches = -(-len(loader.dataset) // batch_size_of(loader))  # type: ignore[arg-type]
        done = self.schedule.steps_done
        self._misled = bool((self._resumed or {}).get("misled"))
        self.crafting.schedule = Schedule(1, steps, batches, self._chosen.pgd_steps, done)

    def _check_length(self, trainer: Any) -> None:
        """Nothing to check: the noise phase comes whenever training ends."""

    def on_train_batch_end(
        self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Count model steps.

        Raises:
            UserError: the loss of the step is not finite.
        """
        found = outputs.get("loss") if isinstance(outputs, dict) else outputs
        if isinstance(found, Tensor):
            self.crafting.check_loss(found)
        if self._model_step_done(pl_module):
            self.schedule.steps_done += 1

    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        """Mislead the network after its last epoch: before the checkpoint that ends training."""
        if self.schedule.finished:
            self._mislead(trainer, pl_module)

    def on_save_checkpoint(self, trainer: Any, pl_module: Any, checkpoint: dict[str, Any]) -> None:
        """Write whether the network was misled beside the rest of the state."""
        super().on_save_checkpoint(trainer, pl_module, checkpoint)
        if "cp_plugin" in checkpoint:
            checkpoint["cp_plugin"]["misled"] = self._misled

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        """Write the poison; where training was stopped early, mislead the network first."""
        self._mislead(trainer, pl_module)
        super().on_train_end(trainer, pl_module)

    def _mislead(self, trainer: Any, pl_module: Any) -> None:
        if self._misled or self.path.exists():
            return
        loss = self.crafting.noise_phase(self._every_image(trainer, pl_module), 0)
        log.info("%s: mean loss of the steps on the trained surrogate %.4f", self.kind, loss)
        self._misled = True
        # Where training was stopped early, the one model phase was so much shorter.
        self.schedule.model_steps = max(1, self.schedule.steps_done)

    def _every_image(self, trainer: Any, pl_module: Any) -> Any:
        """Yield raw batches that hold each image once; the loader's own may drop the last ones."""
        own = training_loader(trainer)
        loader: DataLoader[Any] = DataLoader(
            own.dataset, batch_size_of(own), num_workers=own.num_workers, collate_fn=own.collate_fn
        )
        for batch in loader:
            yield moved(batch, pl_module.device)


class CraftTap(CraftOnTrained):
    """Mislead a module that was trained on clean images: its adversarial images poison.

    Source: Fowl et al., "Adversarial Examples Make Strong Poisons", NeurIPS 2021.
    """

    kind = "tap"
    host_class = AdversarialHost
    settings_class = TapConfig

    def adapted(self, trainer: Any, pl_module: Any, raw: RawDataset | RawStream) -> LightningHost:
        """Return the surrogate as a host whose loss misleads it; see `CraftOnTrained`."""
        host = super().adapted(trainer, pl_module, raw)
        assert isinstance(host, AdversarialHost)
        assert isinstance(self._chosen, TapConfig)
        if self._chosen.targeted:
            host.target_classes = _count_classes(raw.dataset)
        return host


class CraftAap(CraftTap):
    """Mislead a module that was trained under contrastive augmentations, in small steps.

    The augmentations are those of the module's own loader; `configs/poison/aap.yaml` has
    contrastive ones, weakened.

    Source: Wang, Zhu, Gao, "Efficient Availability Attacks against Supervised and Contrastive
    Learning Simultaneously", NeurIPS 2024.
    """

    kind = "aap"
    settings_class = AapConfig


class CraftSep(CraftTap):
    """Mislead all checkpoints of one training together: the vulnerability of the training itself.

    Source: Chen et al., "Self-Ensemble Protection: Training Checkpoints Are Good Data Protectors",
    ICLR 2023; the form with the cross-entropy, without feature alignment and variance reduction.
    """

    kind = "sep"
    host_class = EnsembleHost
    settings_class = SepConfig

    def adapted(self, trainer: Any, pl_module: Any, raw: RawDataset | RawStream) -> LightningHost:
        """Return the surrogate as an ensemble; see `CraftOnTrained`."""
        host = super().adapted(trainer, pl_module, raw)
        assert isinstance(host, EnsembleHost)
        host.shift = max(1, _count_classes(raw.dataset) // 2)
        host.states = list((self._resumed or {}).get("states", ()))
        return host

    def on_train_batch_end(
        self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Count model steps, and keep the checkpoints that are due.

        Raises:
            UserError: the loss of the step is not finite.
        """
        before = self.schedule.steps_done
        super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)
        assert isinstance(self._chosen, SepConfig)
        steps, wanted = self.schedule.total_steps, self._chosen.checkpoints
        done = self.schedule.steps_done
        if done * wanted // steps > before * wanted // steps:
            self._keep(pl_module)

    def on_save_checkpoint(self, trainer: Any, pl_module: Any, checkpoint: dict[str, Any]) -> None:
        """Write the checkpoints so far beside the rest of the state."""
        super().on_save_checkpoint(trainer, pl_module, checkpoint)
        if "cp_plugin" in checkpoint:
            checkpoint["cp_plugin"]["states"] = self._ensemble.states

    def _mislead(self, trainer: Any, pl_module: Any) -> None:
        if not self._ensemble.states:  # training was stopped before the first was due
            self._keep(pl_module)
        super()._mislead(trainer, pl_module)

    def _keep(self, pl_module: Any) -> None:
        state = {
            name: value.detach().cpu().clone() for name, value in pl_module.state_dict().items()
        }
        self._ensemble.states.append(state)

    @property
    def _ensemble(self) -> EnsembleHost:
        assert isinstance(self._host, EnsembleHost)
        return self._host


class CraftPil(CraftOnTrained):
    """Make the label readable from delta alone by a classifier that was trained on clean images.

    The paper's classifier is linear, without a bias, on pixels; `configs/poison/pil.yaml` has it.

    Source: Liu, Chen, Zhang, "Perturbation-Induced Linearization", ICLR 2026.
    """

    kind = "pil"
    host_class = LinearisingHost
    settings_class = PilConfig

    def adapted(self, trainer: Any, pl_module: Any, raw: RawDataset | RawStream) -> LightningHost:
        """Return the surrogate as a host that is to tell nothing; see `CraftOnTrained`."""
        host = super().adapted(trainer, pl_module, raw)
        assert isinstance(host, LinearisingHost)
        assert isinstance(self._chosen, PilConfig)
        host.classes, host.weight = _count_classes(raw.dataset), self._chosen.shortcut
        return host

    def term(self) -> Term:
        """Return what makes the label readable from delta alone.

        Raises:
            UserError: views are not of the size of delta.
        """
        crafting, host = self.crafting, self._host
        assert isinstance(host, LinearisingHost)
        side, views = crafting.attack.perturbation.shape[-1], crafting.mirror.crop_size
        if views is not None and views != side:
            raise UserError(
                f"poison=pil shows delta itself to the classifier, and views have {views} pixels a "
                f"side where delta has {side}; set augmentations.0.crop_size={side} or "
                f"poison.image_size={views}."
            )
        return lambda delta, batch: host.shortcut(delta, batch, crafting.mirror.normalize)


def _count_classes(dataset: Any) -> int:
    names, known = class_names(dataset), labels(dataset)
    assert known is not None
    return max(len(names or ()), int(known.max()) + 1)
