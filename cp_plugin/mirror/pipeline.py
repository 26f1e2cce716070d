"""The mirror: several views of a batch of images, differentiable, as the host would make them."""

from __future__ import annotations

import collections.abc
import itertools
from typing import Any

import torch
from torch import Tensor, nn

from cp_plugin.config.settings import UserError
from cp_plugin.data.fit import luminance
from cp_plugin.data.pipelines import InARow, grid_sides, view_pipelines
from cp_plugin.mirror.base import Operation, Params, Shape, moved
from cp_plugin.mirror.colour import Normalize, RandomGrayscale
from cp_plugin.mirror.containers import Sequence
from cp_plugin.mirror.from_kornia import Kornia
from cp_plugin.mirror.geometry import (
    CenterCrop,
    Pad,
    RandomCrop,
    RandomResizedCrop,
    Resize,
    crop_grid,
)
from cp_plugin.mirror.registry import Translator, Unmirrored

TOLERANCE = 1e-4
"""How far outside [0, 1] a pixel may be, for rounding."""
COLOURS = 3
"""Channels of the images that are mirrored for a data set, grey ones too."""
DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


class Mirror(nn.Module):
    """Differentiable counterpart of a host's augmentation pipeline.

    Calling it draws and applies; `sample` and `apply` are its two halves. It computes in float32,
    in float64 for float64 images, and ignores autocast; views have the dtype and memory format of
    the images. Parameters are drawn on the CPU, so that nothing waits for a GPU.
    """

    def __init__(
        self, pipelines: list[Operation], grids: collections.abc.Sequence[int] = ()
    ) -> None:
        """Put the pipelines of views together.

        Args:
            pipelines: one a view.
            grids: points a side of the grid that the host returns for each view; none: no grids.
        """
        super().__init__()
        self.pipelines = pipelines
        self.grids = tuple(grids)
        self.grey_images = False
        """Whether the host's images have one channel, and so have their views; here three equal
        ones stand for it until the end."""
        self._seen_devices: set[torch.device] = set()
        alike = [list(same) for _, same in itertools.groupby(pipelines, key=id)]
        self._runs = [(same[0], len(same)) for same in alike]
        """Each pipeline with how many views in a row it makes: of all of them at once, since on a
        GPU starting an operation takes longer than a batch of small images does."""

    @property
    def views(self) -> int:
        """Number of views."""
        return len(self.pipelines)

    @property
    def channels(self) -> list[int]:
        """Number of channels of each view of an image with three."""
        return [_channels(view, self.grey_images) for view in self.pipelines]

    @property
    def crop_size(self) -> int | None:
        """Side in pixels of the largest view, None where the pipeline keeps the image's size."""
        return None if self.view_size is None else max(self.view_size)

    @property
    def view_size(self) -> tuple[int, int] | None:
        """Height and width in pixels of the largest view, None as for `crop_size`."""
        sizes = [size for view in self.pipelines if (size := _final_size(view)) is not None]
        return max(sizes, key=lambda size: (max(size), min(size)), default=None)

    @property
    def resized_side(self) -> int | None:
        """Side in pixels of the largest image that a resizing step of any view makes.

        None where a view crops at the images' own scale, or keeps their size: such a pipeline
        shows something else of an image that was resized beforehand.
        """
        sides = [_resized_side(view) for view in self.pipelines]
        return None if None in sides else max(side for side in sides if side is not None)

    def forward(
        self,
        images: Tensor,
        generator: torch.Generator | None = None,
        check: bool = False,
        aspects: Tensor | None = None,
    ) -> list[Tensor]:
        """Draw and apply.

        Args:
            images: (B, C, H, W) floating point in [0, 1].
            generator: on the CPU; None: torch's default one.
            check: look at the pixels on a GPU at every call, not only the first (it waits).
            aspects: of pictures that were squeezed into these images, see `Shape`.

        Returns:
            One (B, C, h, w) a view, normalised as the host does it; a puzzle is (B, pieces, C, h,
            w). Where the host returns grids, then one (B, n, n, 2) a view: the points, x and y in
            pixels of the image, that an n x n grid over the view came from.

        Raises:
            UserError: as `sample` and `apply`.
        """
        return self._views(images, self.sample(images, generator, aspects), check)

    @torch.no_grad()
    def sample(
        self,
        images: Tensor,
        generator: torch.Generator | None = None,
        aspects: Tensor | None = None,
    ) -> list[Params]:
        """Draw the parameters of every view and image, and move them to the images' device.

        Returns:
            What each pipeline drew. Where views follow each other that share one, it drew for the
            images of the first of them, then for the same images of the next.

        Raises:
            UserError: images of a shape that some operation is not defined on, or a generator
                that is not on the CPU.
        """
        shape = self._shape(images)
        if generator is not None and generator.device.type != "cpu":
            raise UserError(
                f"the mirror draws on the CPU, got a generator on {generator.device}: pass "
                "torch.Generator() without a device."
            )
        shape = shape.squeezed_from(aspects)
        drawn = [
            {**pipeline.sample(shape.repeated(views), generator), "batch": shape.batch}
            for pipeline, views in self._runs
        ]
        dtype = torch.float64 if images.dtype == torch.float64 else torch.float32
        moved_params: list[Params] = moved(drawn, images.device, dtype)
        return moved_params

    def apply(  # type: ignore[override]
        self, images: Tensor, params: list[Params] | None = None, check: bool = False
    ) -> Any:
        """Transform images with parameters that `sample` drew for a batch of this shape.

        Args:
            images: (B, C, H, W) floating point in [0, 1].
            params: what `sample` returned.
            check: as in `forward`.

        Returns:
            The list of views. With a function as the only argument it is `nn.Module.apply`, which
            models that hold a mirror call on all their modules.

        Raises:
            UserError: images of another shape, with NaN or outside [0, 1].
        """
        if params is None and not isinstance(images, Tensor):
            return super().apply(images)
        return self._views(images, params or [], check)

    def _views(self, images: Tensor, params: list[Params], check: bool) -> list[Tensor]:
        self._shape(images)
        self._check_values(images, check)
        if len(params) != len(self._runs):
            raise UserError(
                f"apply expected the parameters of {len(self._runs)} pipelines, got {len(params)}: "
                "pass what sample returned."
            )
        if params and params[0]["batch"] != len(images):
            raise UserError(
                f"apply expected the {params[0]['batch']} images that parameters were drawn for, "
                f"got {len(images)}: sample again for every batch."
            )
        precise = images if images.dtype == torch.float64 else images.float()
        last = images.is_contiguous(memory_format=torch.channels_last)
        channels_last = last and not images.is_contiguous()
        with torch.autocast(images.device.type, enabled=False):
            planar = self._shown(precise.contiguous())
            made = [
                view
                for (pipeline, views), drawn in zip(self._runs, params, strict=True)
                for view in pipeline.apply(_repeated(planar, views), drawn).chunk(views)
            ]
        if images.shape[1] == COLOURS:
            counts = zip(made, self.channels, strict=True)
            made = [view.narrow(-3, 0, 1) if count == 1 else view for view, count in counts]
        layout = torch.channels_last if channels_last else torch.contiguous_format
        copy = len(made) > len(params)  # a host may change its views in place, each by itself
        return [
            view.to(images.dtype, copy=copy, memory_format=layout)
            if view.ndim == 4
            else view.to(images.dtype, copy=copy)
            for view in made
        ] + self._grids(params, images.dtype)

    def _grids(self, params: list[Params], dtype: torch.dtype) -> list[Tensor]:
        """Return the grid of each view, where the host returns them."""
        runs = zip(self._runs, params, strict=True)
        boxes = [
            {key: value.chunk(views)[view] for key, value in drawn["steps"][0].items()}
            for (_, views), drawn in runs if self.grids
            for view in range(views)
        ]  # fmt: skip
        return [
            crop_grid(box, side).to(dtype) for box, side in zip(boxes, self.grids, strict=False)
        ]

    def normalize(self, images: Tensor) -> Tensor:
        """Normalise (B, C, H, W) in [0, 1] with the pipeline's last `Normalize`, if it has one.

        Where views have one channel, so has what is returned: the luminance of the images.
        """
        if images.shape[1] == COLOURS and self.channels[-1:] == [1]:
            images = luminance(images)
        for view in reversed(self.pipelines):
            for step in reversed(list(view.walk())):
                if isinstance(step, Normalize):
                    return step.apply(images, {})
        return images

    def _shown(self, images: Tensor) -> Tensor:
        """Return images as the host's transform is given them: grey ones stay so with delta."""
        if not self.grey_images or images.shape[1] != COLOURS:
            return images
        return luminance(images).expand_as(images)

    def extra_repr(self) -> str:
        """List the operations of each view."""
        return "\n".join(f"view {number}: {view}" for number, view in enumerate(self.pipelines))

    def _shape(self, images: Tensor) -> Shape:
        """Check what can be seen without looking at pixels."""
        if not isinstance(images, Tensor) or images.ndim != 4 or images.dtype not in DTYPES:
            came = (
                f"{tuple(images.shape)} {images.dtype}"
                if isinstance(images, Tensor)
                else type(images).__name__
            )
            raise UserError(
                "the mirror expected floating-point images (B, C, H, W) in [0, 1], got "
                f"{came}: stack the images and divide bytes by 255."
            )
        shape = Shape(*images.shape)
        for view in self.pipelines:
            view.check(shape)
        return shape

    def _check_values(self, images: Tensor, check: bool) -> None:
        if torch.compiler.is_compiling():  # a graph holds no look at values
            return
        if images.device.type != "cpu" and not check:
            if images.device in self._seen_devices:
                return
            self._seen_devices.add(images.device)
        if images.numel() == 0:
            return
        low, high = (float(value) for value in images.detach().aminmax())
        if low >= -TOLERANCE and high <= 1 + TOLERANCE:
            return
        first = self._first_name()
        if low != low:
            raise UserError(f"{first} expected images in [0, 1], got NaN: check what made them.")
        raise UserError(
            f"{first} expected images in [0, 1], got pixels from {low:.4g} to {high:.4g}: divide "
            "bytes by 255, and normalise nothing beforehand; the mirror does it."
        )

    def _first_name(self) -> str:
        first = self.pipelines[0]
        while isinstance(first, Sequence) and first.operations:
            first = first.operations[0]
        return first.name


def mirror(pipeline: object) -> Mirror:
    """Make the differentiable counterpart of a host's augmentation pipeline.

    Args:
        pipeline: torchvision's `Compose` (v1 or v2) or one of its transforms, solo-learn's
            `FullTransformPipeline` or `NCropAugmentation`, Lightly's `MultiViewTransform` or one
            of its transforms, or a list of these, one a view.

    Returns:
        A module that maps images (B, C, H, W) in [0, 1] to the list of views.

    Raises:
        UserError: a transform of an unknown class; the text names it and says how to register a
            mirror of it.
    """
    return _translated(pipeline)


def mirror_outline(pipeline: object, of_batches: object = None) -> Mirror:
    """Return a mirror that knows the sizes, the number and the normalisation of views alone.

    So transforms without a mirror (RandAugment and others) are no hindrance to whoever makes no
    views: a monitor, an image defence, noise.

    Args:
        pipeline: as of `mirror`.
        of_batches: what the host transforms whole batches with after that; None: nothing.

    Raises:
        UserError: a transform of an unknown class on float tensors, which may normalise them, or
            one that alone could tell the size of the views.
    """
    try:
        found = _translated(pipeline, True, of_batches)
    except UserError as error:
        raise UserError(
            f"the views' size and normalisation cannot be told from the transform: {error}"
        ) from None
    steps = [step for view in found.pipelines for step in view.walk()]
    unknown = [step.name for step in steps if isinstance(step, Unmirrored)]
    if unknown and found.view_size is None:
        raise UserError(
            f"the size of the views cannot be told, since {unknown[0]} is not known and no crop or "
            "resize stands beside it; add torchvision's Resize or CenterCrop of that size."
        )
    return found


def _translated(pipeline: object, outline: bool = False, of_batches: object = None) -> Mirror:
    if pipeline is None:
        raise UserError(
            "the data set's transform is None, so it makes no views to mirror; let "
            "`self.transform` make them, as Lightly's MultiViewTransform([first, second]) does "
            "(views that a collate_fn or training_step makes are not seen before they are "
            "augmented)."
        )
    found = view_pipelines(pipeline)
    hosts = [pipeline] if found is None else found
    if of_batches is not None:
        after = view_pipelines(of_batches) or [of_batches]
        hosts = [InARow((host, then)) for host in hosts for then in after]
    if not hosts:
        raise UserError(f"the mirror expected a pipeline with at least one view, got {pipeline!r}.")
    translated: dict[int, Operation] = {}
    for host in hosts:
        if id(host) not in translated:
            translated[id(host)] = Translator(outline).view(host)
    return Mirror([translated[id(host)] for host in hosts], grid_sides(pipeline))


def _repeated(images: Tensor, times: int) -> Tensor:
    return images if times == 1 else images.repeat(times, 1, 1, 1)


def _channels(view: Operation, grey_images: bool) -> int:
    """Return how many channels a view has: as the last `Grayscale` says, else as the image."""
    said = [step.channels for step in view.walk() if isinstance(step, RandomGrayscale)]
    return next((count for count in reversed(said) if count), 1 if grey_images else COLOURS)


def _final_size(view: Operation) -> tuple[int, int] | None:
    found = None
    for step in view.walk():
        if isinstance(step, Pad) and found is not None:
            left, top, right, bottom = step.padding
            found = (found[0] + top + bottom, found[1] + left + right)
        found = _size_of(step) or found
    return found


def _resized_side(view: Operation) -> int | None:
    """Return the side of the largest image in a view from its first resizing step on."""
    steps = [(step, size) for step in view.walk() if (size := _size_of(step)) is not None]
    if not steps or isinstance(steps[0][0], (RandomCrop, CenterCrop)):
        return None
    return max(max(size) for _, size in steps)


def _size_of(step: Operation) -> tuple[int, int] | None:
    if isinstance(step, Pad):
        return None
    if isinstance(step, (RandomResizedCrop, RandomCrop, CenterCrop)):
        return step.size
    if isinstance(step, Kornia):
        return step.size
    if isinstance(step, Resize) and step.size is not None:
        return (step.size, step.size) if isinstance(step.size, int) else step.size
    return None
