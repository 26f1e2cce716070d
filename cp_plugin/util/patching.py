"""`patches/`: runtime fixes of upstream faults, loaded by path, applied while a job runs."""

from __future__ import annotations

import importlib.metadata
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from packaging.specifiers import SpecifierSet

from cp_plugin.util.paths import shipped


@dataclass(frozen=True)
class Patch:
    """One fix: a module of `patches/`."""

    name: str
    package: str
    """The distribution that the version range is of."""
    versions: str
    """Versions that need the fix, as a specifier."""
    reason: str
    link: str
    module: Any

    def installed(self) -> str | None:
        """Return the package's version, None where it is not installed."""
        try:
            return importlib.metadata.version(self.package)
        except importlib.metadata.PackageNotFoundError:
            return None

    def is_needed(self) -> bool:
        """Tell whether the version is in range and the fault is there."""
        version = self.installed()
        in_range = version is not None and SpecifierSet(self.versions).contains(version, True)
        return in_range and bool(self.module.is_needed())

    def apply(self) -> Callable[[], None]:
        """Apply the fix; return what takes it back."""
        undo: Callable[[], None] = self.module.apply()
        return undo


def patches() -> list[Patch]:
    """Return the fixes that ship with this package."""
    return [_load(path) for path in sorted(shipped("patches").glob("[a-z]*.py"))]


def _load(path: Any) -> Patch:
    # By path, since editable installs do not show the folder as a part of the package.
    spec = importlib.util.spec_from_file_location(f"cp_plugin_patches_{path.stem}", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return Patch(path.stem, module.PACKAGE, module.VERSIONS, module.REASON, module.LINK, module)
