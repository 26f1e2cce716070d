"""What stands where a host's transforms were while its images are read before them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from cp_plugin.config.settings import UserError
from cp_plugin.data import slots as markers
from cp_plugin.data.image import Canonical
from cp_plugin.data.pipelines import IMAGE, StandIn, takes_samples, view_form


class Probe:
    """Makes what stands where the host's transforms were; they return the image itself, marked."""

    def __init__(self, canonical: Canonical, views: int | None) -> None:
        self._canonical = canonical
        self._views = views

    def of(self, transform: Any) -> ProbeOf:
        """Return what stands in the place of a transform."""
        return ProbeOf(self._canonical, self._views, transform)


class ProbeOf(StandIn):
    """Stands in the place of one transform."""

    def __init__(self, canonical: Canonical, views: int | None, transform: Any) -> None:
        super().__init__(transform)
        self._canonical, self._views = canonical, views
        self._form = view_form(transform)

    def __call__(self, image: Any = None, /, **named: Any) -> Any:
        """Return the mark of a canonical image, or parts of it as the transform returns views."""
        if named or isinstance(image, markers.ViewMarker):
            how = f"with {next(iter(named))}=…" if named else "on what another one has made"
            raise UserError(
                f"the data set calls a transform {how}, and a transform is read only where it is "
                "called on the image alone; keep one pipeline of torchvision, Lightly or "
                "solo-learn in `self.transform` and return `self.transform(image)`."
            )
        if takes_samples(self):
            return self._in_samples(image)
        mark = self._mark(image)
        return mark if self._form is None else markers.rebuilt(self._form, mark.part)

    def _mark(self, image: Any) -> markers.ViewMarker:
        return markers.ViewMarker(self._canonical(image), self._views, self.host, image)

    def _in_samples(self, sample: Mapping[str, Any]) -> Any:
        """Return a sample for each view, the marks in place of their images."""
        mark = self._mark(sample[IMAGE])
        if self._form is None:
            return {**sample, IMAGE: mark}

        def with_part(value: Any) -> Any:
            return {**sample, IMAGE: mark[value]} if isinstance(value, int) else value

        return markers.rebuilt(self._form, with_part)
