"""kNN on frozen features while a model trains."""

from __future__ import annotations

import csv
import logging
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cp_plugin.callbacks.base import Callback, run_folder
from cp_plugin.callbacks.loader_hooks import training_loader
from cp_plugin.callbacks.outline import outline
from cp_plugin.config.settings import MonitorConfig, UserError, given
from cp_plugin.data import RawDataset, clean_dataset
from cp_plugin.data.canonical import canonical_form
from cp_plugin.evaluation.banks import Bank
from cp_plugin.evaluation.metrics import KnnResult, knn
from cp_plugin.hosts import adapt
from cp_plugin.mirror.pipeline import mirror_outline
from cp_plugin.util.random_state import random_state_kept
from cp_plugin.util.run_files import KNN_FILE

log = logging.getLogger("cp_plugin")


class KNNMonitor(Callback):
    """Log the accuracy of a kNN on frozen features, on the clean and on the poisoned bank.

    The bank is the training set and the queries are the validation set, both without augmentation.
    With a poison in the run (`CraftPoison`, `InjectPoison`) the bank is used twice: clean, and
    as the victim has it. Logged as `knn_clean_bank` and `knn_poisoned_bank`, in percent.
    """

    def __init__(
        self,
        bank: Any = None,
        query: Any = None,
        encoder: str | None = None,
        config: MonitorConfig | None = None,
        **settings: Any,
    ) -> None:
        """Take the data sets and the settings.

        Args:
            bank: labelled data set; None: the training set.
            query: labelled data set; None: the validation set.
            encoder: dotted name of the network whose output is the representation; None: the
                first under the usual names (`backbone`, `encoder`, …).
            config: the settings; None: made of `settings`.
            settings: those of `cp_plugin.config.settings.MonitorConfig`, by name.

        Raises:
            UserError: an unknown setting or a value out of range.
        """
        super().__init__()
        self.config = given(MonitorConfig, config, settings, "monitor")
        self._datasets = (bank, query)
        self._encoder_name = encoder
        self.results: list[dict[str, Any]] = []
        """One entry an evaluation: epoch, step, seconds, the two accuracies with k and T, and
        `loss`, the mean training loss since the evaluation before it."""
        self._losses: list[Tensor] = []

    def state_dict(self) -> dict[str, Any]:
        """Return what a checkpoint holds: the evaluations so far."""
        return {"results": self.results}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from a checkpoint, so that a resumed run has the whole curve."""
        self.results = list(state_dict["results"])

    @random_state_kept()
    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Read both data sets once.

        Raises:
            UserError: there is no validation set, or a data set has no labels.
        """
        bank, query = self._datasets
        # Other callbacks may have changed or opened the images before this one is asked.
        bank = clean_dataset(training_loader(trainer).dataset if bank is None else bank)
        if query is None:
            query = _validation_set(trainer)
        raw = RawDataset(bank, None)
        shown = outline(trainer, pl_module, raw).to(pl_module.device)
        poisons = [callback.poison for callback in trainer.callbacks if hasattr(callback, "poison")]
        self._poison = poisons[0] if poisons else None
        resized_side = mirror_outline(raw.transform).resized_side  # as a poison's rows know it
        sizes = (shown.view_size, canonical_form(bank, resized_side).size)
        self._normalize = shown.normalize
        self._bank = Bank.clean(bank, *sizes)
        self._query = Bank.clean(query, *sizes).numbered_as(self._bank)
        self._host = adapt(
            pl_module, lambda sample, _: sample, (), trainer.precision_plugin.forward_context
        )
        self._host.encoder_name = self._encoder_name or self._host.encoder_name

    def on_train_batch_end(
        self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Take note of the loss."""
        loss = outputs.get("loss") if isinstance(outputs, dict) else outputs
        if isinstance(loss, Tensor):
            self._losses.append(loss.detach() * trainer.accumulate_grad_batches)

    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        """Evaluate every n epochs."""
        if (trainer.current_epoch + 1) % self.config.every_n_epochs == 0:
            self._evaluate(trainer, pl_module)

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        """Evaluate the trained model, unless the last epoch did."""
        if not self.results or self.results[-1]["step"] != trainer.global_step:
            self._evaluate(trainer, None)

    @random_state_kept()
    def _evaluate(self, trainer: Any, module_to_log: Any) -> None:
        start = time.perf_counter()
        query = self._features(self._query)
        results = {"knn_clean_bank": self._knn(self._bank, query)}
        if self._poison is not None:
            results["knn_poisoned_bank"] = self._knn(self._bank.poisoned(self._poison()), query)
        found = {name: result.accuracy for name, result in results.items()}
        for name, accuracy in found.items() if module_to_log is not None else ():
            module_to_log.log(name, accuracy, prog_bar=True, batch_size=1)
        if module_to_log is None:  # training is over, and Lightning passes nothing on any more
            for logger in trainer.loggers:
                logger.log_metrics(found, step=trainer.global_step)
        clean = results["knn_clean_bank"]
        losses, self._losses = self._losses, []
        self.results.append(
            {
                "epoch": trainer.current_epoch,
                "step": trainer.global_step,
                "seconds": time.perf_counter() - start,
                "k": clean.k,
                "temperature": clean.temperature,
                "loss": float(torch.stack(losses).mean()) if losses else None,
                **found,
            }
        )

    def _features(self, bank: Bank) -> Any:
        return bank.features(self._host.encode, self._normalize, self._host.device)

    def _knn(self, bank: Bank, query: Any) -> KnnResult:
        return knn(
            self._features(bank),
            bank.labels,
            query,
            self._query.labels,
            self.config.k,
            self.config.temperature,
            index=self.config.index,
        )


BANKS = {"knn_clean_bank": "clean bank", "knn_poisoned_bank": "poisoned bank"}


def _validation_set(trainer: Any) -> Any:
    """Return the data set of the trainer's one validation loader.

    Raises:
        UserError: there is none, or there are several.
    """
    given = trainer.val_dataloaders
    if isinstance(given, Mapping):
        loaders = list(given.values())
    else:
        loaders = list(given) if isinstance(given, (list, tuple)) else [given]
    found = [loader.dataset for loader in loaders if hasattr(loader, "dataset")]
    if not found:
        raise UserError(
            "the kNN monitor needs labelled test images and there is no validation set; "
            "pass query=… (data.val_path=… in a configuration) or leave the monitor out."
        )
    if len(found) > 1:
        raise UserError(
            f"the kNN monitor takes its test images from one validation loader and found "
            f"{len(found)}; pass the data set that it shall use as KNNMonitor(query=…)."
        )
    return found[0]


class Journal(Callback):
    """Write each evaluation of a monitor down as it comes; stands after the monitor."""

    def __init__(self, monitor: KNNMonitor, folder: str | Path | None = None) -> None:
        """Take the monitor, and a folder in place of the run's."""
        super().__init__()
        self._monitor, self._folder = monitor, folder
        self._written = 0

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Leave alone what the run that is resumed wrote."""
        self._written = len(self._monitor.results)

    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        """Write what is new."""
        self._write(trainer)

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        """Write what is new."""
        self._write(trainer)

    def _write(self, trainer: Any) -> None:
        new = self._monitor.results[self._written :]
        self._written += len(new)
        if not new:
            return
        path = Path(self._folder or run_folder(trainer)) / KNN_FILE
        if not trainer.is_global_zero:
            return
        path.parent.mkdir(parents=True, exist_ok=True)
        fresh = not path.exists()
        with path.open("a", newline="", encoding="utf8") as file:
            writer = csv.DictWriter(file, new[0])
            if fresh:
                writer.writeheader()
            writer.writerows(new)
        for row in new:
            found = [f"{text} {row[name]:.1f} %" for name, text in BANKS.items() if name in row]
            log.info("step %d: kNN (k=%d) %s", row["step"], row["k"], ", ".join(found))
