"""Pipelines of the hosts, and which views of an image they make.

Of the hosts' own classes that is known by name. A user's class that holds such pipelines and calls
them on the image (`TwoCropsTransform` and the like) is looked at: a copy of it, with recorders in
place of what it holds, is called on an image, and what comes back shows which pipeline makes which
view.
"""

from __future__ import annotations

import functools
from types import FunctionType, MethodType
from typing import Any, NamedTuple

import torch
from PIL import Image

from cp_plugin.data.slots import elements, rebuilt
from cp_plugin.util.internals import own_modules
from cp_plugin.util.random_state import random_state_kept


def dotted_name(cls: type) -> str:
    """Return module and name of a class."""
    return f"{cls.__module__}.{cls.__qualname__}"


SOLO = "solo.data.pretrain_dataloader."


LIGHTLY = "lightly.transforms."


MULTI_VIEW = (
    LIGHTLY + "multi_view_transform.MultiViewTransform",
    LIGHTLY + "multi_view_transform_v2.MultiViewTransformV2",
)


ONE_IN_A_LIST = tuple(
    f"{LIGHTLY}{name}_transform.{upper}Transform"
    for name, upper in (("mae", "MAE"), ("aim", "AIM"), ("capi", "CAPI"))
)
"""Classes that return the one view of their `transform` in a list."""
WITH_GRIDS = (LIGHTLY + "image_grid_transform.ImageGridTransform",)
"""Classes that return views, then for each where its pixels were in the image."""


KORNIA = "kornia.augmentation."
KORNIA_WITHOUT_GRADIENT = ("RandomEqualize", "RandomPosterize", "RandomClahe", "RandomJPEG")
"""Classes that have no useful gradient with respect to the images."""


SPT = "stable_pretraining.data.transforms."
SPT_BATCH = "stable_pretraining.data.gpu_transforms."
"""Of those that take a whole batch, see `cp_plugin.hosts.stable_pretraining.batch_transform`."""
IMAGE = "image"
"""Where stable-pretraining's transforms find the image in the sample that they are given."""


class InARow:
    """Transforms that a host's class calls one after another."""

    def __init__(self, transforms: tuple[object, ...]) -> None:
        self.transforms = transforms


class StandIn:
    """Stands where a host's transform was, and is called on what that one was called on."""

    def __init__(self, host: Any) -> None:
        self.host = host


def takes_samples(host: Any) -> bool:
    """Whether a transform is called on a whole sample, a dictionary, and not on its image."""
    while isinstance(host, StandIn):
        host = host.host
    return dotted_name(type(host)).startswith(SPT)


def view_pipelines(host: Any) -> list[object] | None:
    """Return the host's pipeline of each view, or None where it makes one view only."""
    if isinstance(host, (list, tuple)):
        return [view for item in host for view in view_pipelines(item) or [item]]
    name = dotted_name(type(host))
    if name == SPT + "MultiViewTransform":
        views = host.transforms
        return list(views.values() if host.is_keys_specified else views)
    if name == SPT_BATCH + "StackedMultiView":
        return [host.chain] * host.n_views
    if name == SPT_BATCH + "MultiView":
        return list(host.chains)
    if name in ONE_IN_A_LIST:
        return [host.transform]
    if _inherits_call(type(host), WITH_GRIDS):
        rows = {id(pair): InARow(tuple(pair)) for pair in host.transforms}
        return [rows[id(pair)] for pair in host.transforms]
    if name == LIGHTLY + "detcon_transform.DetConSTransform" and host.mask_fn is None:
        return list(host.transforms)
    if name == SOLO + "FullTransformPipeline":
        return view_pipelines(list(host.transforms))
    if name == SOLO + "NCropAugmentation":
        return [host.transform] * host.num_crops
    if _inherits_call(type(host), MULTI_VIEW):
        return list(host.transforms)
    calls = _calls_of(host)
    return None if calls is None or isinstance(calls.form, _Number) else calls.pipelines


def view_form(host: Any) -> Any:
    """Return how a user's class returns its views, where that is no plain list: their numbers.

    So `{"global": [0, 1], "local": [2]}` is that of a class that returns three views in a
    dictionary. None for all others.
    """
    if isinstance(host, (list, tuple)):
        return None
    if dotted_name(type(host)) == SPT + "MultiViewTransform":
        numbers = range(len(host.transforms))
        if host.is_keys_specified:
            return dict(zip(host.transforms, numbers, strict=True))
        return {"views": list(numbers)}
    calls = _calls_of(host)
    if calls is None or isinstance(calls.form, _Number):
        return None
    flat = type(calls.form) in (list, tuple) and all(isinstance(i, _Number) for i in calls.form)
    return None if flat else calls.form


def held_pipeline(host: Any) -> object | None:
    """Return the one pipeline that a user's class calls on the image, if that is all it does."""
    calls = _calls_of(host)
    return calls.pipelines[0] if calls is not None and isinstance(calls.form, _Number) else None


def is_pipeline(value: Any) -> bool:
    """Tell whether a value is a transform of a host's, or calls such transforms on an image."""
    if isinstance(value, (list, tuple)):
        return bool(value) and all(map(_is_of_host, value))
    return _is_of_host(value) or _calls_of(value) is not None


def grid_sides(host: Any) -> list[int]:
    """Return, for every view that a host returns with a grid, the points a side of that grid."""
    if not _inherits_call(type(host), WITH_GRIDS):
        return []
    return [int(crop.grid_size) for crop, _ in host.transforms]


def _inherits_call(cls: type, names: tuple[str, ...]) -> bool:
    """Whether a class is one of those named, or inherits its call unchanged."""
    for base in cls.__mro__:
        if dotted_name(base) in names:
            return cls.__call__ is base.__call__
    return False


LIBRARIES = ("torchvision.transforms.", LIGHTLY, SOLO, SPT, KORNIA)
NOT_COPIED = (type, list, tuple, FunctionType, MethodType, functools.partial)
LOOKS = 4
"""How often a user's class is called: one that chooses by chance is not followed."""


class _Call(NamedTuple):
    """What a recorder returns in place of a view."""

    pipeline: object
    of_image: bool
    """Whether the pipeline got the image itself."""


class _Recorder:
    """Stands where a pipeline was."""

    def __init__(self, pipeline: object, image: Image.Image) -> None:
        self._pipeline, self._image = pipeline, image

    def __call__(self, image: Any) -> _Call:
        return _Call(self._pipeline, image is self._image)


def _is_of_host(value: Any) -> bool:
    return f"{type(value).__module__}.".startswith(LIBRARIES) and callable(value)


class _Number(int):
    """The number of a view."""


class _Calls(NamedTuple):
    """What a user's class does with an image."""

    pipelines: list[object]
    """The pipeline of each view."""
    form: Any
    """What it returns, a `_Number` in place of each view."""


def _calls_of(host: Any) -> _Calls | None:
    """Return the pipelines that a user's class calls on an image.

    None where it does anything else, or holds no pipelines.
    """
    if isinstance(host, NOT_COPIED) or not hasattr(host, "__dict__"):
        return None
    if not callable(host) or _is_of_host(host):
        return None
    image = Image.new("RGB", (8, 8))
    recording = _recording(host, image)
    if recording is None:
        return None
    results = []
    with random_state_kept():
        for _ in range(LOOKS):
            try:
                results.append(recording(image))
            except Exception:  # a user's class may raise anything on what is no image
                return None
    found = [_calls_in(result) for result in results]
    return found[0] if all(one == found[0] for one in found) else None


def _recording(host: Any, image: Image.Image) -> Any:
    """Return a copy of an object with recorders for the pipelines that it holds, if any."""
    try:
        other = object.__new__(type(host))
    except TypeError:  # of a class that is made in a way of its own
        return None
    vars(other).update(vars(host))
    held = 0
    places = [vars(other)]
    if isinstance(host, torch.nn.Module):  # keeps transforms that are modules in a table
        places.append(own_modules(other, host))
    for place in places:
        for name, value in list(place.items()):
            if isinstance(value, (list, tuple)) and value and all(map(_is_of_host, value)):
                place[name] = type(value)(_Recorder(item, image) for item in value)
                held += len(value)
            elif _is_of_host(value):
                place[name] = _Recorder(value, image)
                held += 1
    return other if held else None


def _calls_in(result: Any) -> _Calls | None:
    """Return the views in a result, None where there is anything else in it."""
    pipelines: list[object] = []

    def numbered(value: Any) -> Any:
        if not isinstance(value, _Call) or not value.of_image:
            return value
        pipelines.append(value.pipeline)
        return _Number(len(pipelines) - 1)

    form = rebuilt(result, numbered)
    views = elements(form)
    if not views or not all(isinstance(view, _Number) for view in views):
        return None
    return _Calls(pipelines, form)
