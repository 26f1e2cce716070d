"""What a report is made of: the runs of a study, such as the demo, or of any folder of runs."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from cp_plugin.apps.report.costs import COST, Cost, cost, crafts_before
from cp_plugin.apps.study.settings import NONE
from cp_plugin.apps.study.state import FINISHED, PLAN_FILE, read
from cp_plugin.config.settings import UserError
from cp_plugin.config.yaml_files import load_yaml
from cp_plugin.data.picture_files import inside
from cp_plugin.util.run_files import CONFIG_FILE, POISON_FILE, RESULT_FILE

MEASURES = {
    "linear_clean": "linear probe, clean bank",
    "knn_clean": "kNN, clean bank",
    "knn_poisoned": "kNN, poisoned bank",
    "knn_control": "control: kNN of the clean encoder, poisoned bank",
    "linear_poisoned": "linear probe, poisoned bank",
    "linear_control": "control: linear probe of the clean encoder, poisoned bank",
}
"""In the order of the report; the first is the paper's."""


CURVES = ("knn_clean_bank", "knn_poisoned_bank", "knn_control")
"""Of a point of a curve, beside its step."""


@dataclass(frozen=True)
class Row:
    """A clean run or a victim, measured."""

    poison: str
    surrogate: str | None
    victim: str
    backbone: str
    defence: str
    seed: int
    folder: Path
    """The run's own folder."""
    poison_file: Path | None
    """None where no file of it is left, or for a clean run."""
    accuracies: Mapping[str, float]
    """Percent, by the names in `MEASURES`."""
    curve: tuple[Mapping[str, float], ...]
    """The monitor's evaluations: step, `knn_clean_bank`, `knn_poisoned_bank`; in a study, those of
    the clean run's checkpoints too: step, `knn_control`."""
    facts: Mapping[str, Any]
    """Steps, epochs, k, T and what else the run says of itself."""

    def __post_init__(self) -> None:
        """Check that names are text and that what is drawn are numbers.

        Raises:
            ValueError: something else was read.
        """
        for name in (self.poison, self.victim, self.backbone, self.defence, self.surrogate or ""):
            if not isinstance(name, str):
                raise ValueError(f"{str(name)[:40]!r} is no name")
        points = (value for point in self.curve for value in map(point.get, ("step", *CURVES)))
        for value in (*self.accuracies.values(), *points):
            number = isinstance(value, (int, float)) and math.isfinite(value)
            if value is not None and not number:
                raise ValueError(f"{str(value)[:40]!r} is no number")

    @property
    def label(self) -> str:
        """The poison, and its surrogate where there is one."""
        return f"{self.poison} ({self.surrogate})" if self.surrogate else self.poison


@dataclass(frozen=True)
class Found:
    """Everything that a folder holds for a report."""

    name: str
    kind: str
    """`study` or `runs`."""
    rows: tuple[Row, ...]
    unfinished: Mapping[str, str] = field(default_factory=dict)
    """Cells of a study without a result, with the reason."""
    provenance: Mapping[str, Any] = field(default_factory=dict)
    """Hardware, versions, command."""
    folders: Mapping[str, Path] = field(default_factory=dict)
    """The folder of every finished run by its name, crafts too."""
    total: int = 0
    """Cells of the study, or runs."""


@contextmanager
def damage_named(where: Path) -> Iterator[None]:
    """Say of files that hold something else than results that they are damaged.

    Raises:
        UserError: they do.
    """
    try:
        yield
    except UserError:
        raise
    except (LookupError, TypeError, ValueError, AttributeError, OverflowError) as error:
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:200]
        raise UserError(
            f"the results in {where} are damaged or not those of a run ({reason}); run it again, "
            "or take it out of the folder."
        ) from error


def find(folder: Path) -> Found:
    """Read the results in a folder.

    Args:
        folder: of a study, such as the demo, or any with runs below it.

    Raises:
        UserError: there is no measured run in it.
    """
    if not folder.is_dir():
        raise UserError(f"there is no folder {folder}; give that of a study or of runs.")
    with damage_named(folder):
        found = _study(folder) if (folder / PLAN_FILE).is_file() else _runs(folder)
    if not found.rows:
        raise UserError(
            f"{folder} has no finished run with a kNN or a linear probe; run `cp-plugin study`, or "
            "`cp-plugin pretrain` with +monitor=knn."
        )
    return found


def _study(folder: Path) -> Found:
    study = read(folder / PLAN_FILE) or {}
    planned = study["cells"]
    states = {}
    for cell in planned:
        state = read(folder / "cells" / f"{cell['name']}.json") or {}
        states[cell["name"]] = state if state.get("digest") == cell["digest"] else {}
    finished = {name: one for name, one in states.items() if one.get("status") == FINISHED}
    folders = {name: inside(folder, Path(one["folder"])) for name, one in finished.items()}
    known: dict[Path, Cost | None] = {}
    rows = [
        _with_cost(row_of(one, folders, name), cost(_crafts(one, finished, folders), known))
        for name, one in finished.items()
        if one["kind"] != "craft"
    ]
    unfinished = {
        name: str(one.get("reason", one.get("status", "not begun")))
        for name, one in states.items()
        if name not in finished
    }
    whole = read(folder / RESULT_FILE) or {}
    any_result: Mapping[str, Any] = next((one["result"] for one in finished.values()), {})
    provenance = {
        "command": whole.get("command", any_result.get("command")),
        **{key: any_result.get(key) for key in ("hardware", "versions")},
    }
    name = str(study["settings"]["name"])
    return Found(name, "study", tuple(rows), unfinished, provenance, folders, len(planned))


def _crafts(
    state: Mapping[str, Any], states: Mapping[str, Any], folders: Mapping[str, Path]
) -> Iterator[Path]:
    """Yield the folders of the crafts that shaped a victim's poison, the last one first."""
    while (name := state.get("needs", {}).get("poison")) in states:
        state = states[name]
        yield folders[name]


def _with_cost(row: Row, found: Cost | None) -> Row:
    return row if found is None else replace(row, facts={**row.facts, **found.facts()})


def row_of(state: Mapping[str, Any], folders: Mapping[str, Path], name: str) -> Row:
    """Return the row of a finished cell of a study.

    Args:
        state: the content of its file.
        folders: of the runs, by the names of their cells.
        name: the cell's own among them.
    """
    banks = {row["bank"]: row for row in state["banks"]}
    control = {row["bank"]: row for row in state.get("control", ())}
    accuracies = {}
    for bank, row in (
        ("clean", banks.get("clean")),
        ("poisoned", banks.get("poisoned")),
        ("control", control.get("poisoned")),
    ):
        if row is not None:
            accuracies[f"knn_{bank}"] = row["knn"]["accuracy"]
            if "linear" in row:
                accuracies[f"linear_{bank}"] = row["linear"]["last"]
    result = state["result"]
    made_in = folders.get(state.get("needs", {}).get("poison", name), folders[name])
    return Row(
        **{key: state[key] for key in ("poison", "victim", "backbone", "defence")},
        surrogate=_surrogate(state),
        seed=state["seed"],
        folder=folders[name],
        poison_file=_existing(made_in / POISON_FILE),
        accuracies=accuracies,
        curve=(*(result.get("knn") or ()), *state.get("control_curve", ())),
        facts={**_facts(result), **_settings_of(banks["clean"])},
    )


def _surrogate(state: Mapping[str, Any]) -> str | None:
    """Return the surrogate's method, and its backbone where that is not the victim's."""
    backbone = state.get("surrogate_backbone")
    return f"{state['surrogate']}, {backbone}" if backbone else state["surrogate"]


def _settings_of(bank: Mapping[str, Any]) -> dict[str, Any]:
    near, linear = bank["knn"], bank.get("linear")
    facts = {key: near[key] for key in ("k", "temperature", "distance", "bank_size")}
    if linear:
        facts |= {"probe_epochs": linear["epochs"], "probe_lr": linear["lr"]}
        facts["probe"] = linear.get("protocol", "cosine")  # the only one of earlier versions
    return facts


def _facts(result: Mapping[str, Any]) -> dict[str, Any]:
    left_out = ("knn", "versions", "hardware", "command", "folder", *COST)
    return {key: value for key, value in result.items() if key not in left_out}


def _runs(folder: Path) -> Found:
    """Read every run below a folder."""
    rows: list[Row] = []
    provenance: dict[str, Any] = {}
    folders: dict[str, Path] = {}
    for file in sorted(folder.rglob(RESULT_FILE)):
        result = read(file)
        if result is None or not (file.parent / CONFIG_FILE).is_file():
            continue
        folders[str(file.parent.relative_to(folder))] = file.parent
        if "knn" in result:
            provenance = {key: result.get(key) for key in ("hardware", "versions", "command")}
            with damage_named(file.parent):
                row = _run(file.parent, result)
                made_in = row.poison_file.parent if row.poison_file and row.surrogate else None
                rows.append(_with_cost(row, cost(crafts_before(made_in)) if made_in else None))
    whole = read(folder / RESULT_FILE) or {}
    provenance["command"] = whole.get("command", provenance.get("command"))
    rows.sort(key=lambda row: row.poison != NONE)
    return Found(folder.resolve().name, "runs", tuple(rows), {}, provenance, folders, len(folders))


def _run(folder: Path, result: Mapping[str, Any]) -> Row:
    cfg: Any = OmegaConf.to_container(load_yaml(folder / CONFIG_FILE))
    poison = _poison_name(cfg.get("poison") or {}, str(result["poison"]))
    names = (("knn_clean", "knn_clean_bank"), ("knn_poisoned", "knn_poisoned_bank"))
    accuracies = {ours: result[theirs] for ours, theirs in names if result.get(theirs) is not None}
    crafted = result.get("surrogate_steps") is not None
    return Row(
        poison=poison,
        surrogate=str(result["surrogate"]) if crafted and result.get("surrogate") else None,
        victim=str(result["method"]),
        backbone=str(cfg["backbone"]["name"]).removeprefix("timm/"),
        defence=str((cfg.get("defence") or {}).get("name", NONE)),
        seed=int(result["seed"]),
        folder=folder,
        poison_file=_existing(folder / POISON_FILE) or _existing(_injected(cfg)),
        accuracies=accuracies,
        curve=tuple(result["knn"]),
        facts={**_facts(result), "distance": "cosine"},
    )


def _poison_name(poison: Mapping[str, Any], name: str) -> str:
    """Return what a poison file is called, or the poison that its run crafted."""
    if name != "inject":
        return name
    file = Path(str(poison["path"]))
    if file.name != POISON_FILE:
        return file.stem
    made = read(file.parent / RESULT_FILE)
    return str(made["poison"]) if made else file.parent.name


def _injected(cfg: Mapping[str, Any]) -> Path | None:
    path = (cfg.get("poison") or {}).get("path")
    return Path(str(path)) if path else None


def _existing(file: Path | None) -> Path | None:
    return file if file is not None and file.is_file() else None
