"""Which poison and which monitor a configuration selects."""

from __future__ import annotations

import difflib
import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cp_plugin.baseline_config import ErrorMinConfig, SyntheticConfig, TapConfig
from cp_plugin.config import (
    CraftConfig,
    InjectConfig,
    MonitorConfig,
    RandomConfig,
    UserError,
    build,
)

CRAFTS = ("cp", "cp_class", "cp_byol")
CRAFTED = (CraftConfig, ErrorMinConfig, TapConfig)
"""Settings of poisons that need a surrogate."""
Settings = CraftConfig | ErrorMinConfig | TapConfig | SyntheticConfig | RandomConfig | InjectConfig
KINDS: dict[str, type[Any] | None] = {
    **dict.fromkeys(CRAFTS, CraftConfig),
    "error_min": ErrorMinConfig,
    "tap": TapConfig,
    "synthetic": SyntheticConfig,
    "random": RandomConfig,
    "inject": InjectConfig,
    "none": None,
}


@dataclass(frozen=True)
class Selection:
    """The groups `poison` and `monitor` of a configuration, checked."""

    name: str
    """The poison's name; `none` where there is none."""
    poison: Settings | None
    monitor: MonitorConfig | None

    @classmethod
    def of(cls, poison: Mapping[str, Any] | None, monitor: Mapping[str, Any] | None) -> Selection:
        """Check the two groups.

        Args:
            poison: the group `poison` as plain values, with its `name`; None is `none`.
            monitor: the group `monitor`, or None.

        Raises:
            UserError: an unknown name or key, or a value out of range.
        """
        values = dict(poison or {"name": "none"})
        name = str(values.pop("name", None))
        if name not in KINDS:
            near = difflib.get_close_matches(name, KINDS, n=1)
            hint = f"did you mean {near[0]}?" if near else f"known: {', '.join(KINDS)}."
            raise UserError(f"poison.name={name} is unknown; {hint}")
        kind = KINDS[name]
        if kind is None and values:
            raise UserError(f"poison.{next(iter(values))} is not a setting of poison=none.")
        settings = None if kind is None else build(kind, values)
        watched = dict(monitor) if monitor else None
        if watched is not None:
            watched.pop("name", None)
            return cls(name, settings, build(MonitorConfig, watched, "monitor"))
        return cls(name, settings, None)

    @property
    def crafts(self) -> bool:
        """Whether the run makes a poison by training a surrogate."""
        return isinstance(self.poison, CRAFTED)

    def tag(self, settings: Mapping[str, Any]) -> str:
        """Return `<poison>-<8 hex digits>`, depending on all settings and on the poison file."""
        digest = hashlib.sha256(json.dumps(settings, sort_keys=True, default=str).encode())
        for path in (getattr(self.poison, "path", None), getattr(self.poison, "init", None)):
            if path and path != "random" and Path(path).is_file():
                digest.update(Path(path).read_bytes())
        return f"{self.name}-{digest.hexdigest()[:8]}"
