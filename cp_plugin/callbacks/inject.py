"""A poison in the training images, and views made by the mirror: callbacks for victims."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cp_plugin.attack.inject import added, part
from cp_plugin.attack.noise import NoiseConfig, sample_noise
from cp_plugin.attack.poison_file import Poison
from cp_plugin.callbacks.base import CANONICAL, POISON, VIEWS, Callback, prepare_fit, run_folder
from cp_plugin.callbacks.loader_hooks import Exchange, LoaderHooks, check_batches, training_loader
from cp_plugin.callbacks.resumption import Resumption
from cp_plugin.config.settings import (
    CacheMode,
    CleanConfig,
    Fit,
    InjectConfig,
    UserError,
    build,
    cache_mode,
)
from cp_plugin.data import RawDataset, RawStream, streams, wrappers
from cp_plugin.data.canonical import canonical_form, canonical_size
from cp_plugin.data.read_once import read_once
from cp_plugin.data.transformed import resized
from cp_plugin.mirror import mirror
from cp_plugin.mirror.channels import with_channels
from cp_plugin.mirror.pipeline import mirror_outline
from cp_plugin.util.random_state import random_state_kept
from cp_plugin.util.run_files import POISON_FILE
from cp_plugin.util.seed import derived_seed, run_seed

log = logging.getLogger("cp_plugin")


class InjectPoison(Callback):
    """Train a victim: the poison is added to each training image before the augmentation.

    Example:
        >>> trainer = Trainer(callbacks=[InjectPoison("poison.safetensors"), KNNMonitor()])
    """

    acts_on_images = (POISON,)

    def __init__(
        self,
        poison: Poison | str | Path,
        fraction: float = 1.0,
        folder: str | Path | None = None,
    ) -> None:
        """Take a poison or the path of one.

        Args:
            poison: the poison or its file.
            fraction: part of the poisoned images that stays so, in (0, 1], the same part of each
                class; what is used of the poison is then written as a file of its own.
            folder: where; None: the run's folder.

        Raises:
            UserError: the file is missing or damaged, or the fraction is out of range.
        """
        super().__init__()
        self.fraction = build(InjectConfig, {"path": "-", "fraction": fraction}).fraction
        self._folder, self._writes = folder, self.fraction < 1
        self._whole = poison if isinstance(poison, Poison) else Poison.load(poison)
        self._poison = self._whole

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Take the place before whatever else acts on images."""
        if stage == "fit":
            prepare_fit(trainer)

    def poison(self) -> Poison:
        """Return what is used of the poison: all of it until training has started."""
        return self._poison

    @random_state_kept()
    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Put the poisoned data set in the loader.

        Raises:
            UserError: the poison belongs to other images or classes.
        """
        dataset = training_loader(trainer).dataset
        self._poison = part(dataset, self._whole, self.fraction)
        self._announce_size(dataset)
        self._checked = False
        self._exchange = Exchange(trainer, added(dataset, self._poison))

    def on_train_batch_start(
        self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int
    ) -> None:
        """Check that the first batch is of the poisoned data set.

        Raises:
            UserError: the loader keeps an iterator of its own.
        """
        if not self._checked:
            self._exchange.check()
            self._checked = True

    def _announce_size(self, dataset: Any) -> None:
        """Say where images are brought to the poison's size, and what clean runs then need."""
        if self._poison.fit == "cover" or streams(dataset) or not wrappers.transforms_of(dataset):
            return
        pipeline = RawDataset(dataset, None).transform
        try:
            resized_side = mirror_outline(pipeline).resized_side
        except UserError:  # a victim's transform needs no mirror
            resized_side = None
        form, size = canonical_form(dataset, resized_side), self._poison.size
        if form.size == size:
            form.announce()
            return
        log.warning(
            "every image is resized and centre-cropped to the %d x %d pixels of the poison before "
            "its augmentation; clean runs that it is compared with see the same pixels with "
            "+poison.image_size=%d (in your own code CanonicalImages(%d))",
            *size,
            *[self._poison.image_size] * 2,
        )

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        """Put the loader's own data set back; write what a part of a poison was used."""
        self._exchange.restore()
        path = Path(self._folder or run_folder(trainer)) / POISON_FILE
        if self._writes and trainer.is_global_zero and not path.exists():
            self.poison().save(path)

    def on_fit_end(self, trainer: Any, pl_module: Any) -> None:
        """Say so where there was nothing to train on.

        Raises:
            UserError: the training loader brings no batch.
        """
        check_batches(trainer)

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        """Put the loader's own data set back."""
        if hasattr(self, "_exchange"):
            self._exchange.restore()


class CanonicalImages(Callback):
    """Train a clean baseline: on the images of a poisoned run, without delta.

    Images that are not of canonical size are resized and centre-cropped before the augmentation,
    as they are for a poison. Where all have that size, or where the poison is brought to the size
    of each image (`fit: cover`), nothing is done.

    Example:
        >>> trainer = Trainer(callbacks=[CanonicalImages(), MirrorViews()])
    """

    acts_on_images = (CANONICAL,)

    def __init__(self, image_size: int | None = None, fit: Fit = "crop") -> None:
        """Take `poison.image_size` and `fit` of the run that this one is compared with.

        Raises:
            UserError: it is out of range.
        """
        super().__init__()
        self._config = build(CleanConfig, {"image_size": image_size, "fit": fit})
        self._exchange: Exchange | None = None

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Take the place before whatever else acts on images."""
        if stage == "fit":
            prepare_fit(trainer)

    @random_state_kept()
    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Put the canonical images in the loader.

        Raises:
            UserError: the data set's transform has no mirror, or an image cannot be read.
        """
        dataset = training_loader(trainer).dataset
        if not wrappers.transforms_of(dataset):  # finished tensors, which no one resizes
            return
        if self._config.fit == "cover":  # a poison of that kind leaves images as large as they are
            return
        resized_side = mirror_outline(RawDataset(dataset, None).transform).resized_side
        form = canonical_form(dataset, resized_side, self._config.image_size)
        form.announce()
        if form.changes:
            self._exchange = Exchange(trainer, resized(dataset, form.size))

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        """Put the loader's own data set back."""
        self._restore()

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        """Put the loader's own data set back."""
        self._restore()

    def _restore(self) -> None:
        if self._exchange is not None:
            self._exchange.restore()


class MirrorViews(Callback):
    """Train on views made by the mirror on the module's device, not by the host's transform.

    Same distribution, same pixels within the mirror's error, no Pillow in the loader.
    """

    acts_on_images = (VIEWS,)

    def __init__(self, cache: CacheMode = "auto") -> None:
        """Take whether images are read once, see `cp_plugin.data.read_once`.

        Raises:
            UserError: it is none of auto, true and false.
        """
        super().__init__()
        self._cache = cache_mode(cache)
        self._resumption: Resumption | None = None
        self._resumed: dict[str, Any] | None = None

    def state_dict(self) -> dict[str, Any]:
        """Return what a checkpoint holds: the place in the order of the images."""
        return {} if self._resumption is None else self._resumption.state()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from a checkpoint with the images that would have come."""
        self._resumed = state_dict or None

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Take the place after whatever else acts on images."""
        if stage == "fit":
            prepare_fit(trainer)

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Take the transform off the data set and put its mirror behind the loader.

        Raises:
            UserError: the transform has no mirror.
        """
        self._start(trainer, pl_module)
        self._resumption = Resumption(trainer, training_loader(trainer), self._hooks.order)
        self._resumption.on_train_start(self._resumed)

    def on_train_epoch_start(self, trainer: Any, pl_module: Any) -> None:
        """Let the first epoch after a resume begin as it would have."""
        if self._resumption is not None:
            self._resumption.on_train_epoch_start()

    @random_state_kept()
    def _start(self, trainer: Any, pl_module: Any) -> None:
        loader = training_loader(trainer)
        dataset = loader.dataset
        opened = RawStream if streams(dataset) else RawDataset
        whole = opened(dataset, None)
        view_mirror = with_channels(mirror(whole.transform), whole).to(pl_module.device)
        raw = opened(dataset, canonical_size(dataset, view_mirror.resized_side))
        read_once(raw, self._cache, loader)
        generator = torch.Generator()
        seed = run_seed()

        def views(batch: Any) -> list[Tensor]:
            place = (trainer.fit_loop.total_batch_idx, trainer.global_rank)
            generator.manual_seed(derived_seed(seed, "victim", *place))
            made: list[Tensor] = view_mirror(batch.images.float().div_(255), generator=generator)
            return made

        self._hooks = LoaderHooks(trainer, pl_module, raw, views)

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        """Give module and loader their own back."""
        self._hooks.stop()

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        """Give module and loader their own back when training breaks off."""
        if hasattr(self, "_hooks"):
            self._hooks.stop()


class NoisePoison(InjectPoison):
    """Draw random or synthetic noise for the training images and train a victim on it.

    When training ends the noise is written to the run's folder, as a crafted poison is.
    """

    def __init__(self, config: NoiseConfig, folder: str | Path | None = None) -> None:
        """Take the settings.

        Args:
            config: a `RandomConfig` or a `SyntheticConfig`.
            folder: where the noise is written; None: the run's folder.
        """
        Callback.__init__(self)
        self.config = config
        self.fraction = 1.0
        self._folder, self._writes = folder, True
        self._noise: Poison | None = None

    def poison(self) -> Poison:
        """Return the noise, once training has started."""
        assert self._noise is not None
        return self._noise

    @random_state_kept()
    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Draw the noise and put the poisoned data set in the loader.

        Raises:
            UserError: the noise needs labels and there are none.
        """
        self._draw(trainer)
        super().on_train_start(trainer, pl_module)

    def on_fit_end(self, trainer: Any, pl_module: Any) -> None:
        """Draw the noise where a run that was resumed had nothing left to train.

        Raises:
            UserError: the training loader brings no batch.
        """
        super().on_fit_end(trainer, pl_module)
        if self._noise is None:
            self._draw(trainer)
            path = Path(self._folder or run_folder(trainer)) / POISON_FILE
            if trainer.is_global_zero and not path.exists():
                self.poison().save(path)

    @random_state_kept()
    def _draw(self, trainer: Any) -> None:
        dataset = training_loader(trainer).dataset
        opened = RawStream if streams(dataset) else RawDataset
        resized_side = mirror_outline(opened(dataset, None).transform).resized_side
        size = canonical_size(dataset, resized_side, self.config.image_size, self.config.fit)
        self._noise = self._whole = sample_noise(dataset, size, self.config, run_seed())
