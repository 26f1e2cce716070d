"""From the settings of a study to its cells: every run that it needs, once each."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from itertools import product
from typing import Any, Literal

from cp_plugin.apps.hydra_app import compose
from cp_plugin.apps.study.settings import NONE, Grid, Overrides, PoisonSettings, StudySettings
from cp_plugin.config.settings import UserError
from cp_plugin.util.seed import derived_seed

Kind = Literal["craft", "clean", "victim"]


@dataclass(frozen=True)
class Cell:
    """One run of the embedded engine, one job of a Hydra launcher."""

    name: str
    """Unique in its study; also the name of its files."""
    kind: Kind
    poison: str
    surrogate: str | None
    """The surrogate's method; None where the poison has none."""
    victim: str | None
    """The victim's method; None for a craft."""
    backbone: str
    defence: str
    seed: int
    config: str
    """The configuration that is run, such as `simclr`."""
    overrides: Overrides
    """All but folders and the files of other cells."""
    needs: Mapping[str, str] = field(default_factory=dict)
    """Cells that must be finished before: `poison` (the craft), `clean` (for the control)."""
    surrogate_backbone: str | None = None
    """That of the surrogate; None: the victim's own, or there is no surrogate."""
    turn: int = 0
    """Which entry of the grid needs it first; entries are run one after the other."""
    probe: str = "cosine"
    """Which linear probe is fitted to what was trained, see `evaluate`."""
    file: str | None = None
    """The copy of a given poison in the study's folder, see `state.Folder.given`."""
    digest: str = ""
    """Changes with every setting of the cell and of the cells it needs."""

    def plain(self) -> dict[str, Any]:
        """Return the cell as JSON has it."""
        return asdict(self)


def plan(study: StudySettings) -> dict[str, Cell]:
    """Return all cells by name, those that others need first."""
    cells: dict[str, Cell] = {}
    for turn, grid in enumerate(study.grid):
        axes = (grid.seeds, grid.defences, grid.backbones, grid.victims, grid.poisons)
        for seed, defence, backbone, victim, poison in product(*axes):
            for surrogate in _surrogates(study, grid, poison):
                made = list(_crafts(study, grid.backbones[0], poison, surrogate, seed))
                clean = _victim(study, NONE, None, victim, backbone, defence, seed, {})
                needs = {"clean": clean.name} if poison != NONE else {}
                needs |= {"poison": made[-1].name} if made else {}
                last = _victim(study, poison, surrogate, victim, backbone, defence, seed, needs)
                if surrogate and grid.backbones[0] != backbone:
                    last = _transferred(last, grid.backbones[0])
                for cell in (*made, clean, last):
                    cells.setdefault(cell.name, replace(cell, turn=turn))
    levels = _levels(cells)
    ordered = sorted(cells.values(), key=lambda cell: (cell.turn, levels[cell.name]))
    return _with_digests({cell.name: cell for cell in ordered})


def by_level(cells: Mapping[str, Cell]) -> list[list[Cell]]:
    """Return the cells in groups; a group needs only cells of the groups before it.

    What the first entry of the grid needs comes before the rest, so that entries can stand in the
    order of their value.
    """
    levels = _levels(cells)
    groups: dict[tuple[int, int], list[Cell]] = {}
    for cell in cells.values():
        groups.setdefault((cell.turn, levels[cell.name]), []).append(cell)
    return [groups[key] for key in sorted(groups)]


def check(cells: Mapping[str, Cell]) -> None:
    """Compose and check every configuration that differs by more than its seed.

    Raises:
        UserError: unknown names, missing keys or values out of range, with the cell's name.
    """
    from cp_plugin.engine.run import check as check_run
    from cp_plugin.evaluation.metrics import PROBES

    seen = set()
    for cell in cells.values():
        if cell.probe not in PROBES:
            raise UserError(f"probe must be one of {', '.join(PROBES)}; got {cell.probe!r}.")
        overrides = [one for one in cell.overrides if not one.startswith("seed=")]
        if (cell.config, *overrides) in seen:
            continue
        seen.add((cell.config, *overrides))
        try:
            check_run(compose(cell.config, [*cell.overrides, *_placeholders(cell)]))
        except UserError as error:
            raise UserError(f"in the study's cell {cell.name}: {error}") from error


def _surrogates(study: StudySettings, grid: Grid, poison: str) -> tuple[str | None, ...]:
    settings = study.poisons[poison]
    if settings.sampled:
        return (None,)
    return (settings.surrogate,) if settings.surrogate else grid.surrogates


def _crafts(
    study: StudySettings, backbone: str, poison: str, surrogate: str | None, seed: int
) -> Iterator[Cell]:
    """Yield the crafts of a poison, and before them those of the poison that it starts from."""
    settings = study.poisons[poison]
    if surrogate is None:
        return
    seed = seed if settings.seed is None else settings.seed
    previous, given = None, None
    if settings.init:
        given = _file_of(study.poisons[settings.init])
        for cell in () if given else _crafts(study, backbone, settings.init, surrogate, seed):
            yield cell
            previous = cell.name
    for number in range(1, settings.num_surrogates + 1):
        name = f"craft-{poison}-{surrogate}-{backbone}-{seed}"
        if settings.num_surrogates > 1:
            name += f"-{number}"
        yield Cell(
            name,
            "craft",
            poison,
            surrogate,
            None,
            backbone,
            NONE,
            seed,
            surrogate,
            (
                *study.base,
                *study.backbones[backbone],
                *study.methods.get(surrogate, ()),
                f"seed={derived_seed(seed, poison, number)}",
                *settings.settings,
            ),
            {"poison": previous} if previous else {},
            file=given if number == 1 else None,
        )
        previous = name


def _file_of(poison: PoisonSettings) -> str | None:
    """Return what the study's folder calls a poison that its file names."""
    return f"{poison.digest}.safetensors" if poison.file else None


def _victim(
    study: StudySettings,
    poison: str,
    surrogate: str | None,
    victim: str,
    backbone: str,
    defence: str,
    seed: int,
    needs: Mapping[str, str],
) -> Cell:
    kind: Kind = "clean" if poison == NONE else "victim"
    parts = [kind, victim, backbone, poison, surrogate or "", defence, str(seed)]
    parts = [part for part in parts if part and (part != NONE or kind != "clean")]
    settings = study.poisons[poison]
    return Cell(
        "-".join(parts),
        kind,
        poison,
        surrogate,
        victim,
        backbone,
        defence,
        seed,
        victim,
        (
            *study.base,
            *study.backbones[backbone],
            *study.methods.get(victim, ()),
            *study.victim,
            *study.defences[defence],
            f"seed={seed}",
            *(("+poison=inject",) if surrogate else settings.settings),
        ),
        needs,
        probe=study.probe,
        file=_file_of(settings),
    )


def _transferred(cell: Cell, backbone: str) -> Cell:
    """Return the cell of a victim whose poison was made on another backbone."""
    return replace(cell, name=f"{cell.name}-made_on_{backbone}", surrogate_backbone=backbone)


def _placeholders(cell: Cell) -> list[str]:
    if "poison" not in cell.needs and cell.file is None:
        return []
    return ["poison.init=later" if cell.kind == "craft" else "poison.path=later"]


def _levels(cells: Mapping[str, Cell]) -> dict[str, int]:
    levels: dict[str, int] = {}

    def level(name: str) -> int:
        if name not in levels:
            levels[name] = 1 + max(
                (level(other) for other in cells[name].needs.values()), default=-1
            )
        return levels[name]

    for name in cells:
        level(name)
    return levels


def _with_digests(cells: Mapping[str, Cell]) -> dict[str, Cell]:
    """Fill in the digests; cells come after those that they need."""
    done: dict[str, Cell] = {}
    for name, cell in cells.items():
        below = [done[other].digest for other in cell.needs.values()]
        own = [cell.file] if cell.file else []
        text = json.dumps([cell.config, cell.overrides, below, *own])
        digest = hashlib.sha256(text.encode()).hexdigest()[:16]
        done[name] = replace(cell, digest=digest)
    return done
