"""What stock solo-learn trains on, checked as soon as it is loaded.

Loggers make their folders before any callback of Lightning's runs; what is refused here is refused
before that, with nothing written.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from torch.utils.data import DataLoader

from cp_plugin.attack.inject import part
from cp_plugin.attack.poison_file import Poison
from cp_plugin.config.selection import Selection
from cp_plugin.config.settings import UserError
from cp_plugin.data import RawDataset, names_or_numbers
from cp_plugin.mirror import mirror

LoaderMaker = Callable[..., DataLoader[Any]]


def checked(
    prepare: LoaderMaker, selection: Selection, poison: Poison | None = None
) -> LoaderMaker:
    """Return solo-learn's `prepare_dataloader` with a look at what it has made.

    Args:
        prepare: solo-learn's own.
        selection: the poison and the monitor.
        poison: what the file that is injected holds.
    """

    @functools.wraps(prepare)
    def prepare_dataloader(*args: Any, **kwargs: Any) -> DataLoader[Any]:
        loader = prepare(*args, **kwargs)
        check_loader(loader, selection, poison)
        return loader

    return prepare_dataloader


def check_loader(
    loader: DataLoader[Any], selection: Selection, poison: Poison | None = None
) -> None:
    """Check that the selected poison fits the images.

    Args:
        loader: of the training set.
        selection: the poison and the monitor.
        poison: what the file that is injected holds.

    Raises:
        UserError: there are too few images, they lack labels or a mirror, or the poison belongs to
            others.
    """
    dataset = loader.dataset
    if selection.poison is None:
        return
    if len(loader) == 0:
        raise UserError(
            f"{len(dataset)} images make no batch of {loader.batch_size}; "  # type: ignore[arg-type]
            "set optimizer.batch_size to fewer or check data.train_path."
        )
    if poison is not None:
        part(dataset, poison, 1.0)
        return
    if getattr(selection.poison, "granularity", None) == "class":
        _check_labels(dataset, selection.name)
    pipeline = RawDataset(dataset, None).transform
    mirror(pipeline)


def _check_labels(dataset: Any, name: str) -> None:
    if names_or_numbers(dataset) is None:
        raise UserError(
            f"poison={name} has one delta a class and these images have no labels; use labelled "
            "images or poison.granularity=sample."
        )
