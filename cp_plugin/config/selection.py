"""Which poison, which monitor and which defence a configuration selects."""

from __future__ import annotations

import difflib
import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from cp_plugin.config.baselines import (
    AapConfig,
    AueConfig,
    ErrorMinConfig,
    PilConfig,
    RandomConfig,
    SepConfig,
    SyntheticConfig,
    TapConfig,
    TrainedSurrogateConfig,
    TueConfig,
    UnlearnableClustersConfig,
)
from cp_plugin.config.defences import Settings as DefenceSettings
from cp_plugin.config.defences import check_defence, defence_settings
from cp_plugin.config.settings import (
    CacheMode,
    CleanConfig,
    CraftConfig,
    InjectConfig,
    MonitorConfig,
    UserError,
    build,
    cache_mode,
)

GROUPS = ("poison", "monitor", "defence")
"""The configuration's groups, in the order in which `Selection.of` takes them."""
CRAFTS = ("cp", "cp_class", "cp_byol")
CRAFTED = (CraftConfig, ErrorMinConfig, TrainedSurrogateConfig)
"""Settings of poisons that need a surrogate."""
Settings = (
    CraftConfig
    | ErrorMinConfig
    | TrainedSurrogateConfig
    | SyntheticConfig
    | RandomConfig
    | InjectConfig
)
KINDS: dict[str, type[Any] | None] = {
    **dict.fromkeys(CRAFTS, CraftConfig),
    "error_min": ErrorMinConfig,
    "aue": AueConfig,
    "tap": TapConfig,
    "aap": AapConfig,
    "tue": TueConfig,
    "pil": PilConfig,
    "sep": SepConfig,
    "unlearnable_clusters": UnlearnableClustersConfig,
    "synthetic": SyntheticConfig,
    "random": RandomConfig,
    "inject": InjectConfig,
    "none": None,
}


@dataclass(frozen=True)
class Selection:
    """The groups `poison`, `monitor` and `defence` of a configuration, checked."""

    name: str
    """The poison's name; `none` where there is none."""
    poison: Settings | None
    monitor: MonitorConfig | None
    defence_name: str = "none"
    """The defence's name; `none` where there is none."""
    defence: DefenceSettings | None = None
    clean: CleanConfig = field(default_factory=CleanConfig)
    """How the images of a clean run are those of a poison."""
    cache: CacheMode = "auto"
    """`data.cache`: whether images are read once."""

    @classmethod
    def of(
        cls,
        poison: Mapping[str, Any] | None,
        monitor: Mapping[str, Any] | None,
        defence: Mapping[str, Any] | None = None,
    ) -> Selection:
        """Check the groups.

        Args:
            poison: the group `poison` as plain values, with its `name`; None is `none`.
            monitor: the group `monitor`, or None.
            defence: the group `defence` as plain values, with its `name`; None is `none`.

        Raises:
            UserError: an unknown name or key, a value out of range, or a defence for a surrogate.
        """
        values = dict(poison or {"name": "none"})
        name = str(values.pop("name", None))
        if name not in KINDS:
            near = difflib.get_close_matches(name, KINDS, n=1)
            hint = f"did you mean {near[0]}?" if near else f"known: {', '.join(KINDS)}."
            raise UserError(f"poison.name={name} is unknown; {hint}")
        kind = KINDS[name]
        clean = CleanConfig()
        if kind is None:
            for key in values.keys() - {"image_size", "fit"}:
                raise UserError(f"poison.{key} is not a setting of poison=none.")
            clean = build(CleanConfig, values)
        settings = None if kind is None else build(kind, values)
        watched = None
        if monitor:
            given = {key: value for key, value in monitor.items() if key != "name"}
            watched = build(MonitorConfig, given, "monitor")
        defending = dict(defence or {"name": "none"})
        defence_name = str(defending.pop("name", None))
        chosen = cls(
            name,
            settings,
            watched,
            defence_name,
            defence_settings(defence_name, defending),
            clean,
        )
        if chosen.crafts and chosen.defence is not None:
            raise UserError(
                f"defence={defence_name} belongs to a victim, and poison={name} crafts a poison; "
                "craft without it, then train on poison=inject with it."
            )
        return chosen

    @classmethod
    def read(cls, cfg: DictConfig) -> Selection:
        """Return what the groups of a configuration select; see `of`."""
        nodes = (cfg.get(group) for group in GROUPS)
        values: Any = [
            OmegaConf.to_container(node) if isinstance(node, DictConfig) else None for node in nodes
        ]
        cache = cache_mode(OmegaConf.select(cfg, "data.cache", default="auto"))
        return replace(cls.of(*values), cache=cache)

    def check_method(self, method: str) -> None:
        """Check that a victim's method can have the defence.

        Raises:
            UserError: it cannot; the reason is given.
        """
        check_defence(self.defence_name, method)

    @property
    def crafts(self) -> bool:
        """Whether the run makes a poison by training a surrogate."""
        return isinstance(self.poison, CRAFTED)

    @property
    def needs_classifier(self) -> bool:
        """Whether the surrogate of the poison is a supervised one."""
        if isinstance(self.poison, TrainedSurrogateConfig):
            return self.poison.reads_labels
        return isinstance(self.poison, ErrorMinConfig)

    def tag(self, settings: Mapping[str, Any]) -> str:
        """Return `<poison>[-<defence>]-<8 hex digits>`: of all settings and the files."""
        digest = hashlib.sha256(json.dumps(settings, sort_keys=True, default=str).encode())
        own = (self.poison, self.defence)
        for path in (*(getattr(one, "path", None) for one in own), getattr(own[0], "init", None)):
            if path and path != "random" and Path(path).is_file():
                digest.update(Path(path).read_bytes())
        return f"{self.label}-{digest.hexdigest()[:8]}"

    @property
    def label(self) -> str:
        """The poison's name, and the defence's where there is one."""
        return self.name if self.defence is None else f"{self.name}-{self.defence_name}"
