"""The YAML file of a study: what is varied, and Hydra's overrides for each name that is used."""

from __future__ import annotations

import dataclasses
import difflib
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from cp_plugin.apps.study.overrides import check_launcher, check_overrides
from cp_plugin.config.settings import UserError
from cp_plugin.config.yaml_files import load_yaml
from cp_plugin.util.paths import shipped
from cp_plugin.util.whole_files import sha256

NONE = "none"
"""The poison of a clean run, and the defence of an undefended one."""
NAME = re.compile(r"[A-Za-z][A-Za-z0-9_]*")
FILE = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]*\.safetensors")
"""A poison file beside the study's: a name, never a path."""
Overrides = tuple[str, ...]
FORMER_KEYS = {"chain": "num_surrogates", "drawn": "sampled"}
"""Keys that files of version 0.1 have, and what they are called now."""


@dataclass(frozen=True)
class PoisonSettings:
    """How a poison comes about."""

    settings: Overrides
    """Overrides of the run that crafts it, `+poison=…` among them."""
    num_surrogates: int = 1
    """New surrogates that hand it on; each starts from the poison of the one before."""
    init: str | None = None
    """Another poison of the study to start from: a crafted one, or a file."""
    surrogate: str | None = None
    """A fixed surrogate, for poisons of one method; None: every surrogate of the grid."""
    seed: int | None = None
    """Of the one craft that victims of all seeds share; None: each seed has a craft of its own."""
    sampled: bool = False
    """True: nothing is trained for it, each victim samples it by `settings`."""
    file: str | None = None
    """A poison file beside the study's own, which victims are given; None: it is made."""
    digest: str = ""
    """Of the file's bytes."""


@dataclass(frozen=True)
class Grid:
    """One product of axes; a study may have several."""

    poisons: tuple[str, ...]
    victims: tuple[str, ...]
    seeds: tuple[int, ...]
    backbones: tuple[str, ...]
    surrogates: tuple[str, ...] = ("simclr",)
    defences: tuple[str, ...] = (NONE,)


@dataclass(frozen=True)
class StudySettings:
    """A study as its file has it."""

    name: str
    poisons: Mapping[str, PoisonSettings]
    backbones: Mapping[str, Overrides]
    grid: tuple[Grid, ...]
    base: Overrides = ()
    """Overrides of every run."""
    victim: Overrides = ()
    """Overrides of victims and of clean runs."""
    methods: Mapping[str, Overrides] = field(default_factory=dict)
    """Overrides of a method wherever it is trained; its name is that of a configuration."""
    defences: Mapping[str, Overrides] = field(default_factory=dict)
    probe: str = "cosine"
    """The linear probe of clean runs and victims: `cosine`, `paper` or `none`, see `evaluate`."""
    launcher: Overrides = ()
    """Overrides for Hydra itself, such as `hydra/launcher=joblib`."""


def read(config: str) -> StudySettings:
    """Read and check a study.

    Args:
        config: a YAML file, or the name of a study that comes with the package.

    Raises:
        UserError: there is no such study, or the file has unknown keys or names.
    """
    path = _find(config)
    values = OmegaConf.to_container(load_yaml(path))
    if not isinstance(values, dict):
        raise UserError(f"{path} must hold the keys of a study, such as poisons and grid.")
    named = {"name": path.stem, **{str(key): value for key, value in values.items()}}
    return parse(named, path.parent)


def folder_of(config: str) -> Path:
    """Return the folder of a study's file, see `read`."""
    return _find(config).parent


def parse(values: Mapping[str, Any], folder: Path | None = None) -> StudySettings:
    """Check plain values, as YAML gives them.

    Args:
        values: the keys of a study.
        folder: where poison files that it names lie; None: it may name none.

    Raises:
        UserError: unknown keys or names, missing keys, values of the wrong type, overrides that
            are not a file's to say.
    """
    _keys(values, StudySettings, "")
    poisons = {NONE: PoisonSettings(("+poison=none",), sampled=True)}
    for name, node in _named(values, "poisons").items():
        if name == NONE:
            raise UserError("poisons.none is always there; leave it out of poisons.")
        poisons[name] = _poison(f"poisons.{name}", node, folder)
    defences = {
        name: _overrides(f"defences.{name}", node)
        for name, node in _named(values, "defences").items()
    }
    backbones = {
        name: _overrides(f"backbones.{name}", node)
        for name, node in _named(values, "backbones").items()
    }
    study = StudySettings(
        name=_name("name", values["name"]),
        poisons=poisons,
        backbones=backbones or {"default": ()},
        defences={NONE: (), **defences},
        methods={
            name: _overrides(f"methods.{name}", node)
            for name, node in _named(values, "methods").items()
        },
        grid=tuple(
            _grid(f"grid.{number}", node, tuple(backbones or {"default": ()}))
            for number, node in enumerate(_list("grid", values.get("grid")))
        ),
        probe=_name("probe", values.get("probe", "cosine")),
        **{key: _overrides(key, values.get(key)) for key in ("base", "victim")},
        launcher=_strings("launcher", values.get("launcher")),
    )
    check_launcher(study.launcher)
    _check_names(study)
    return study


def known(what: str, name: str, names: Iterable[str]) -> None:
    """Check a name.

    Raises:
        UserError: it is none of the names; the nearest one is proposed.
    """
    choices = list(names)
    if name not in choices:
        near = difflib.get_close_matches(name, choices, n=1)
        hint = f"did you mean {near[0]}?" if near else f"known: {', '.join(choices)}."
        raise UserError(f"{what} names {name!r}, which is unknown; {hint}")


def _find(config: str) -> Path:
    path, folder = Path(config), shipped("configs") / "pretrain" / "study"
    if path.is_file():
        return path
    if path.suffix not in (".yaml", ".yml") and (folder / f"{config}.yaml").is_file():
        return folder / f"{config}.yaml"
    names = ", ".join(sorted(file.stem for file in folder.glob("*.yaml")))
    raise UserError(f"there is no study {config}; give a YAML file, or one of: {names}.")


def _keys(node: Mapping[str, Any], kind: type[Any], where: str) -> None:
    fields = {one.name: one for one in dataclasses.fields(kind)}
    for key in node:
        known(f"the study{where and f' in {where}'}", str(key), fields)
    optional = (dataclasses.MISSING, dataclasses.MISSING)
    for name, one in fields.items():
        required = (one.default, one.default_factory) == optional
        if required and name != "backbones" and node.get(name) is None:
            raise UserError(f"the study has no {f'{where}.' if where else ''}{name}; add it.")


def _poison(where: str, node: Any, folder: Path | None) -> PoisonSettings:
    if not isinstance(node, dict):
        raise UserError(f"{where} must have keys such as settings; got {node!r}.")
    if node.get("file") is not None:
        return _given(where, node, folder)
    node = {FORMER_KEYS.get(key, key): value for key, value in node.items()}
    _keys(node, PoisonSettings, where)
    count = node.get("num_surrogates", 1)
    if not isinstance(count, int) or isinstance(count, bool) or count < 1:
        raise UserError(f"{where}.num_surrogates must be an integer of at least 1, got {count!r}.")
    sampled = node.get("sampled", False)
    if not isinstance(sampled, bool):
        raise UserError(f"{where}.sampled must be true or false, got {sampled!r}.")
    seed = node.get("seed")
    if seed is not None and (not isinstance(seed, int) or isinstance(seed, bool)):
        raise UserError(f"{where}.seed must be a whole number, got {seed!r}.")
    if sampled and set(node) & {"num_surrogates", "init", "surrogate", "seed"}:
        raise UserError(
            f"{where} is sampled noise and has no surrogate: leave num_surrogates, init, "
            "surrogate and seed out."
        )
    texts = {
        key: None if node.get(key) is None else _name(f"{where}.{key}", node[key])
        for key in ("init", "surrogate")
    }
    settings = _overrides(f"{where}.settings", node.get("settings"))
    return PoisonSettings(settings, count, texts["init"], texts["surrogate"], seed, sampled)


def _given(where: str, node: Mapping[str, Any], folder: Path | None) -> PoisonSettings:
    """Return a poison that is there already.

    Raises:
        UserError: it is said how it is made, or the file is not beside the study's.
    """
    name = node["file"]
    if set(node) != {"file"}:
        raise UserError(f"{where} has a file, which is as it is: leave its other keys out.")
    if not isinstance(name, str) or not FILE.fullmatch(name):
        raise UserError(
            f"{where}.file must be the name of a .safetensors file beside the study's own, no "
            f"path, got {name!r}."
        )
    path = None if folder is None else folder / name
    if path is None or not path.is_file():
        raise UserError(f"{where}.file names {name}, which is not beside the study's file.")
    digest = sha256(path)[:16]
    return PoisonSettings(("+poison=inject",), sampled=True, file=name, digest=digest)


def _grid(where: str, node: Any, backbones: tuple[str, ...]) -> Grid:
    if not isinstance(node, dict):
        raise UserError(f"{where} must have keys such as poisons, victims, seeds; got {node!r}.")
    _keys(node, Grid, where)
    seeds = _list(f"{where}.seeds", node["seeds"])
    if not all(isinstance(seed, int) and not isinstance(seed, bool) for seed in seeds):
        raise UserError(f"{where}.seeds must be whole numbers, got {seeds}.")
    axes = {key: node[key] for key in ("surrogates", "defences") if node.get(key) is not None}
    axes |= {key: node[key] for key in ("poisons", "victims")}
    axes["backbones"] = node.get("backbones") or list(backbones)
    names = {
        key: tuple(_name(f"{where}.{key}", one) for one in _list(f"{where}.{key}", value))
        for key, value in axes.items()
    }
    return Grid(seeds=tuple(seeds), **names)


def _check_names(study: StudySettings) -> None:
    for name, poison in study.poisons.items():
        if poison.init is None:
            continue
        known(f"poisons.{name}.init", poison.init, set(study.poisons) - {NONE, name})
        if study.poisons[poison.init].sampled and study.poisons[poison.init].file is None:
            raise UserError(f"poisons.{name}.init names {poison.init}, which is not crafted.")
        if study.poisons[poison.init].init is not None:
            raise UserError(
                f"poisons.{name}.init names {poison.init}, which has an init of its own; a poison "
                "can start only from one that starts anew."
            )
    for number, grid in enumerate(study.grid):
        for axis in ("poisons", "backbones", "defences"):
            for name in getattr(grid, axis):
                known(f"grid.{number}.{axis}", name, getattr(study, axis))


def _named(values: Mapping[str, Any], key: str) -> dict[str, Any]:
    node = values.get(key)
    node = {} if node is None else node
    if not isinstance(node, dict):
        raise UserError(f"{key} must be a mapping from names to settings, got {node!r}.")
    return {_name(key, name): value for name, value in node.items()}


def _name(where: str, name: Any) -> str:
    # Names become parts of file names and of overrides.
    if not isinstance(name, str) or not NAME.fullmatch(name):
        raise UserError(
            f"{where} must be a name of letters, digits and underscores (quote words such as "
            f"no and off in YAML), got {name!r}."
        )
    return name


def _list(where: str, node: Any) -> list[Any]:
    if not isinstance(node, list) or not node:
        raise UserError(f"{where} must be a list with at least one entry, got {node!r}.")
    return node


def _overrides(where: str, node: Any) -> Overrides:
    found = _strings(where, node)
    check_overrides(where, found)
    return found


def _strings(where: str, node: Any) -> Overrides:
    if node is None or node == []:
        return ()
    items = _list(where, node)
    if not all(isinstance(item, str) for item in items):
        raise UserError(
            f"{where} must be a list of overrides in Hydra's language, such as max_epochs=10; got "
            f"{items}."
        )
    return tuple(items)
