"""The data sets inside a data set: wrappers, subsets and joins, followed down to the images.

Nothing here writes to a user's object: a transform is replaced on shallow copies of a data set and
its wrappers, so that a training and a validation set that share their images never see each other's
changes.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from torch.utils.data import ConcatDataset, Dataset, IterableDataset, Subset
from torchvision.datasets import VisionDataset
from torchvision.datasets.vision import StandardTransform

from cp_plugin.config.settings import UserError
from cp_plugin.data.kept import unshared
from cp_plugin.data.pipelines import is_pipeline

TRANSFORM = "transform"
HEX_ADDRESS = re.compile(r"0x[0-9a-fA-F]+")


class Place(NamedTuple):
    """A data set and the row of it that a row of the outer data set leads to."""

    dataset: Any
    row: int


def attributes(dataset: Any) -> dict[str, Any]:
    """Return what the object itself holds."""
    found: dict[str, Any] = getattr(dataset, "__dict__", {})
    return found


def check_map_style(dataset: Any) -> None:
    """Check that images can be asked for by row.

    Raises:
        UserError: the data set streams its images, or has no length.
    """
    name = type(dataset).__name__
    if isinstance(dataset, IterableDataset) or not hasattr(dataset, "__getitem__"):
        raise UserError(
            f"{name} streams its images, but each image needs a fixed row to keep its "
            "perturbation; use a map-style data set, one with __getitem__ and __len__."
        )
    if not hasattr(dataset, "__len__"):
        raise UserError(f"{name} has no length; add __len__, so that rows can be counted.")
    if len(dataset) == 0:
        raise UserError(f"{name} is empty: no image was found; check its folder and its filter.")


def children(dataset: Any) -> dict[str, Any]:
    """Return the attributes of a data set that hold data sets, or a list of them."""
    return {
        name: value
        for name, value in attributes(dataset).items()
        if _is_dataset(value) or _is_dataset_list(value)
    }


def inside(dataset: Any) -> Iterator[Any]:
    """Yield the data sets directly inside a data set."""
    for value in children(dataset).values():
        if _is_dataset_list(value):
            yield from value
        else:
            yield value


def owns_transform(dataset: Any) -> bool:
    """Tell whether the transform is an attribute of the object itself, not one passed through."""
    if TRANSFORM in attributes(dataset):
        return True
    settable = getattr(getattr(type(dataset), TRANSFORM, None), "fset", None) is not None
    return settable and not children(dataset)


def transform_names(dataset: Any) -> list[str]:
    """Return the attributes of the object itself that hold what is applied to its images.

    That is `transform`, and attributes with pipelines of a host: all of them where `transform` is
    missing or None, else those whose name begins so (`transform_prime`); another one beside it
    (`resize`) prepares the image for it.
    """
    others = [
        name
        for name, value in attributes(dataset).items()
        if name not in (TRANSFORM, "transforms") and "target" not in name and is_pipeline(value)
    ]
    if not owns_transform(dataset):
        return others
    if getattr(dataset, TRANSFORM) is None:
        return others or [TRANSFORM]
    return [TRANSFORM, *(name for name in others if name.startswith(TRANSFORM))]


def transforms_of(dataset: Any) -> list[Any]:
    """Return the outermost transforms of each branch, None where a branch's are all None.

    Several of one data set, each for a view of its own, are one list.
    """
    values = [getattr(dataset, name) for name in transform_names(dataset)]
    own = values if len(values) < 2 else [values]
    if own and own[0] is not None:
        _check_joint(dataset)
        return own
    below = [found for child in inside(dataset) for found in transforms_of(child)]
    if any(found is not None for found in below) or not own:
        return below
    _check_joint(dataset)
    return own


def pipeline_of(dataset: Any) -> Any:
    """Return the transform that a data set applies to its images, None where it applies none.

    Raises:
        UserError: there is no `transform` attribute, or joined data sets have different ones.
    """
    found = transforms_of(dataset)
    if not found:
        raise UserError(
            f"{type(dataset).__name__} has no attribute `{TRANSFORM}`, nor another one with a "
            "known pipeline, so its images cannot be read before they are augmented; keep the "
            f"augmentation in `self.{TRANSFORM}` and apply it in __getitem__, or of a stream in "
            "__iter__."
        )
    for other in found[1:]:
        if not _same(found[0], other):
            raise UserError(
                "The joined data sets have different transforms; give all of them the same one, "
                f"got {_one_line(found[0])} and {_one_line(other)}."
            )
    return found[0]


def with_transform(dataset: Any, replace: Callable[[Any], Any]) -> Any:
    """Return a shallow copy of a data set whose outermost transform t is `replace(t)`.

    The images and their list are shared with the original, which stays as it is.
    """
    names = transform_names(dataset)
    if names:
        below = [found for child in inside(dataset) for found in transforms_of(child)]
        if getattr(dataset, names[0]) is not None or all(found is None for found in below):
            copy = shallow_copy(dataset)
            for name in names:
                _set(copy, name, replace(getattr(dataset, name)))
            return copy
    copy = shallow_copy(dataset)
    for name, value in children(dataset).items():
        if not _is_dataset_list(value):
            if transforms_of(value):
                vars(copy)[name] = with_transform(value, replace)
        else:
            vars(copy)[name] = type(value)(
                with_transform(item, replace) if transforms_of(item) else item for item in value
            )
    return copy


def shallow_copy(dataset: Any) -> Any:
    """Return an object of the same class with the same attributes, but places of its own for them.

    A data set may keep samples; what is read through the copy stays out of the original's. Not
    `copy.copy`: wrappers that pass unknown attributes on would recurse in it.
    """
    same = object.__new__(type(dataset))
    for name, value in vars(dataset).items():
        # The data set inside a wrapper is copied only where its transform is exchanged.
        vars(same)[name] = value if _is_dataset(value) else unshared(value)
    return same


def place(dataset: Any, row: int) -> Place:
    """Follow a row through subsets, joins and wrappers to the data set that holds the image."""
    if isinstance(dataset, ConcatDataset):
        for part in dataset.datasets:
            if row < len(part):  # type: ignore[arg-type]
                return place(part, row)
            row -= len(part)  # type: ignore[arg-type]
    inner = single(dataset)
    if inner is None:
        return Place(dataset, row)
    indices = indices_of(dataset)
    if indices is not None:
        return place(inner, int(indices[row]))
    return place(inner, row) if len(inner) == len(dataset) else Place(dataset, row)


def single(dataset: Any) -> Any:
    """Return the data set inside a wrapper, None where there is none or more than one."""
    found = list(inside(dataset))
    return found[0] if len(found) == 1 else None


def indices_of(dataset: Any) -> Sequence[int] | None:
    """Return the rows that a subset takes of the data set inside it."""
    if isinstance(dataset, Subset):
        return dataset.indices
    indices: Any = attributes(dataset).get("indices")
    if indices is None or not hasattr(indices, "__len__") or len(indices) != len(dataset):
        return None
    found: Sequence[int] = indices
    return found


def file_of(dataset: Any, row: int) -> str | None:
    """Return the path of the image in a row, None where the data set does not say."""
    holder, row = place(dataset, row)
    for name in ("samples", "imgs", "images", "files", "paths"):
        entries = getattr(holder, name, None)
        if not isinstance(entries, (list, tuple)) or not 0 <= row < len(entries):
            continue
        entry = entries[row][0] if isinstance(entries[row], (list, tuple)) else entries[row]
        if isinstance(entry, (str, Path)):
            # Below the root, or, as in torchvision's folders, with a root that may be relative.
            below = Path(getattr(holder, "root", "")) / entry
            return str(below if below.is_file() or not Path(entry).is_file() else entry)
    return None


def _is_dataset(value: Any) -> bool:
    if isinstance(value, Dataset):
        return True
    readable = hasattr(type(value), "__getitem__") and hasattr(type(value), "__len__")
    return (
        readable
        and hasattr(value, "__dict__")
        and bool(
            TRANSFORM in vars(value)
            or any(isinstance(item, Dataset) for item in vars(value).values())
        )
    )


def _is_dataset_list(value: Any) -> bool:
    return isinstance(value, (list, tuple)) and bool(value) and all(map(_is_dataset, value))


def _set(dataset: Any, name: str, transform: Any) -> None:
    setattr(dataset, name, transform)
    if isinstance(dataset, VisionDataset) and name == TRANSFORM:
        dataset.transforms = StandardTransform(transform, dataset.target_transform)


def _check_joint(dataset: Any) -> None:
    """Refuse a transform of image and target together: its image part cannot be taken out."""
    both = getattr(dataset, "transforms", None)
    if isinstance(dataset, VisionDataset) and not isinstance(both, StandardTransform | None):
        raise UserError(
            f"{type(dataset).__name__} has `transforms` for image and target together; give the "
            f"augmentation of the images as `{TRANSFORM}`."
        )


def _same(first: Any, second: Any) -> bool:
    if first is second:
        return True
    texts = [HEX_ADDRESS.sub("", repr(pipeline)) for pipeline in (first, second)]
    return type(first) is type(second) and texts[0] == texts[1]


def _one_line(pipeline: Any) -> str:
    text = " ".join(repr(pipeline).split())
    return text if len(text) <= 80 else text[:77] + "…"
