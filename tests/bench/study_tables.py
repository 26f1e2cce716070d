"""The README's tables of studies: accuracies, the paper's table, how long a poison lasts."""

from __future__ import annotations

import statistics
from pathlib import Path
from typing import Any

import numpy as np
from scipy.stats import spearmanr

from cp_plugin.apps.report.figures import mean_curve
from cp_plugin.apps.report.rows import Row, row_of
from cp_plugin.apps.report.tables import markdown, spread, tables
from cp_plugin.apps.study.settings import NONE
from tests.bench.provenance import source

Result = dict[str, Any]
NAMED = 3
"""Cells without a result that are named."""
STUDY_MEASURES = ("linear_clean", "knn_clean", "knn_poisoned", "knn_control")
CURVES = {
    "knn_clean_bank": "clean bank",
    "knn_poisoned_bank": "poisoned bank",
    "knn_control": "control",
}
"""What a poison's curves are, and what they are called."""


def study(results: list[Result]) -> str:
    """Accuracies of the newest study, defence by defence, with the worst case over victims."""
    newest = results[-1]
    rows = [row_of(cell, {"": Path()}, "") for cell in _measured(newest)]
    lines = []
    for table in tables([row for row in rows if row.defence == NONE]):
        if table.measure in STUDY_MEASURES:
            lines += [f"**{table.title}**", "", markdown(table), ""]
    lines += _defended(rows)
    return "\n".join([*lines, _setting(newest), *_missing(newest), source(newest)])


def _measured(result: Result) -> list[Result]:
    return [cell for cell in result["cells"] if cell["kind"] != "craft"]


def _setting(result: Result) -> str:
    measured = _measured(result)
    steps = sorted({cell["result"]["steps"] for cell in measured})
    epochs = sorted({cell["result"]["epochs"] for cell in measured})
    seeds = sorted({cell["seed"] for cell in measured})
    near, linear = (measured[0]["banks"][0].get(key) for key in ("knn", "linear"))
    probe = ""
    if linear:  # a study with `probe: none` has none
        protocol = linear.get("protocol", "cosine")
        probe = f"; linear probe `{protocol}`: {linear['epochs']} epochs, last epoch"
    told = f"Percent; seed {seeds[0]}. "
    if len(seeds) > 1:
        told = (
            "Percent; mean ± standard deviation of the sample over seeds "
            f"{', '.join(map(str, seeds))} (a bare figure: one seed). "
        )
    return (
        f"{told}Victims of {', '.join(map(str, steps))} steps "
        f"({', '.join(map(str, epochs))} epochs)"
        f"{_surrogates(result)}. kNN: k = {near['k']}, T = {near['temperature']}, "
        f"cosine{probe}."
    )


def _missing(result: Result) -> list[str]:
    missing = [f"`{name}`: {reason}" for name, reason in result["unfinished"].items()]
    if not missing:
        return []
    more = f" and {len(missing) - NAMED} more" if len(missing) > NAMED else ""
    return ["Without a result: " + "; ".join(missing[:NAMED]) + f"{more}."]


def reproduction(results: list[Result]) -> str:
    """The paper's table: every victim of the newest study, and what its poison cost."""
    newest = results[-1]
    keys = ("linear_clean", "linear_poisoned", "knn_clean", "knn_poisoned", "knn_control")
    titles = ("linear, clean bank", "poisoned", "kNN, clean bank", "poisoned", "control")
    lines = [
        f"| victim | poison | surrogate | {' | '.join(titles)} | steps of surrogates | "
        "image passes | craft, min |",
        "|" + "---|" * 11,
    ]
    costs = {_identity(row): row for row in newest["rows"]}
    victims = list(dict.fromkeys(cell["victim"] for cell in _measured(newest)))
    order = {name: number for number, name in enumerate(newest["settings"]["poisons"])}

    def place(cell: Result) -> tuple[Any, ...]:
        transferred = cell["surrogate"] not in (None, cell["victim"])
        return victims.index(cell["victim"]), transferred, order[cell["poison"]]

    for cell in sorted(_measured(newest), key=place):
        found, cost = row_of(cell, {"": Path()}, "").accuracies, costs[_identity(cell)]
        spent = (cost["surrogate_steps"], cost["image_passes"], cost["craft_seconds"])
        cells = (
            cell["victim"],
            cell["poison"],
            cell["surrogate"] or "-",
            *(f"{found[key]:.1f}" if key in found else "-" for key in keys),
            "-" if spent[0] is None else spent[0],
            "-" if spent[1] is None else f"{spent[1]:,}",
            "-" if spent[2] is None else f"{spent[2] / 60:.1f}",
        )
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    return "\n".join([*lines, "", _setting(newest), *_missing(newest), source(newest)])


def augment(results: list[Result]) -> str:
    """Clean runs whose views were made in two ways: accuracies of the newest study."""
    newest = results[-1]
    lines = ["| views by | linear probe | kNN | runs |", "|---|---|---|---|"]
    for way in dict.fromkeys(cell["backbone"] for cell in _measured(newest)):
        own = [cell for cell in _measured(newest) if cell["backbone"] == way]
        banks = [cell["banks"][0] for cell in own]
        cells = (
            spread([bank["linear"]["last"] for bank in banks]),
            spread([bank["knn"]["accuracy"] for bank in banks]),
            len(own),
        )
        lines.append(f"| {way} | " + " | ".join(map(str, cells)) + " |")
    return "\n".join([*lines, "", _setting(newest), source(newest)])


def supervised(results: list[Result]) -> str:
    """Supervised victims of the newest study: network by network, each poison beside the noise."""
    newest = results[-1]
    rows = newest["rows"]
    columns = {
        "own_classifier": "own classifier",
        "linear_clean_bank": "linear, clean bank",
        "knn_clean_bank": "kNN, clean bank",
        "knn_poisoned_bank": "poisoned",
        "knn_poisoned_bank_clean_encoder": "control",
    }
    lines = [
        f"| victim's network | poison | made on | {' | '.join(columns.values())} | below noise | "
        "seeds |",
        "|" + "---|" * (len(columns) + 5),
    ]
    order = {name: number for number, name in enumerate(newest["settings"]["poisons"])}
    groups: dict[tuple[Any, ...], list[Result]] = {}
    for row in rows:
        made_on = (row["surrogate_backbone"] or row["backbone"]) if row["surrogate"] else "-"
        groups.setdefault((row["backbone"], row["poison"], made_on), []).append(row)
    for (network, poison, made_on), own in sorted(
        groups.items(), key=lambda item: (item[0][0], order[item[0][1]], item[0][2])
    ):
        values = [[row[key] for row in own if row[key] is not None] for key in columns]
        cells = [str(spread(found)) if found else "-" for found in values]
        drop = _below_noise(own, groups.get((network, "random", "-"), [])) if own else "-"
        seeds = ", ".join(str(row["seed"]) for row in own)
        lines.append("| " + " | ".join([network, poison, made_on, *cells, drop, seeds]) + " |")
    told = (
        "*Below noise*: how much lower the own classifier's accuracy on clean test images is than "
        "that of the victim of random noise with the same seed. "
    )
    return "\n".join([*lines, "", told + _setting(newest), *_missing(newest), source(newest)])


def _below_noise(own: list[Result], noise: list[Result]) -> str:
    known = {row["seed"]: row["own_classifier"] for row in noise}
    drops = [known[row["seed"]] - row["own_classifier"] for row in own if row["seed"] in known]
    return str(spread(drops)) if drops and own[0]["poison"] not in (NONE, "random") else "-"


def _identity(cell: Result) -> tuple[Any, ...]:
    return tuple(cell[key] for key in ("victim", "poison", "surrogate", "defence", "seed"))


def defended(results: list[Result]) -> str:
    """What the own classifier of supervised victims gets right: each poison under each defence."""
    newest = results[-1]
    found: dict[tuple[str, str], list[float]] = {}
    for row in newest["rows"]:
        found.setdefault((row["poison"], row["defence"]), []).append(row["own_classifier"])
    defences = list(dict.fromkeys(defence for _, defence in found))
    names = ["no defence" if defence == NONE else defence for defence in defences]
    lines = [f"| poison | {' | '.join(names)} |", "|---" * (len(defences) + 1) + "|"]
    for poison in dict.fromkeys(poison for poison, _ in found):
        cells = [
            str(spread(found[poison, defence])) if (poison, defence) in found else "-"
            for defence in defences
        ]
        lines.append(f"| {poison} | " + " | ".join(cells) + " |")
    told = [_setting(newest), *_missing(newest), source(newest)]
    return "\n".join([*lines, "", "Accuracy on clean test images. " + told[0], *told[1:]])


def curves(results: list[Result]) -> str:
    """How long each poison of the newest study lasts: means over seeds, step by step."""
    newest = results[-1]
    rows = [row_of(cell, {"": Path()}, "") for cell in _measured(newest)]
    steps = [int(step) for step in mean_curve(rows, "knn_clean_bank")[0]]
    costs: dict[str, list[Result]] = {}
    for row in newest["rows"]:
        costs.setdefault(row["poison"], []).append(row)
    lines = [
        f"| poison | kNN | {' | '.join(map(str, steps))} |",
        "|---|---|" + "---|" * len(steps),
    ]
    told = []
    for poison in dict.fromkeys(row.poison for row in rows):
        own = [row for row in rows if row.poison == poison]
        for key, name in CURVES.items():
            if mean_curve(own, key)[0]:
                values = [spread(one) for one in _by_step(own, key, steps)]
                lines.append(f"| {poison} | {name} | {' | '.join(map(str, values))} |")
        if poison != NONE:
            pairs = zip(
                _by_step(own, "knn_control", steps),
                _by_step(own, "knn_poisoned_bank", steps),
                strict=True,
            )
            gaps = [
                spread([there - here for there, here in zip(*pair, strict=True)]) for pair in pairs
            ]
            lines.append(f"| {poison} | **gap** | {' | '.join(map(str, gaps))} |")
            told.append(_cost_and_gap(poison, costs[poison], gaps, steps))
    return "\n".join([*lines, "", *told, "", _setting(newest), *_missing(newest), source(newest)])


def long_runs(results: list[Result]) -> str:
    """Victims one by one, and how each came there: the newest study of each machine."""
    newest = {result["provenance"]["hardware"]: result for result in results}
    return "\n\n".join(map(_long_runs_of, newest.values()))


def _long_runs_of(newest: Result) -> str:
    """Accuracies at the end, then kNN and loss by steps."""
    measured = _measured(newest)
    keys = {
        "linear_clean": "linear, clean bank",
        "linear_poisoned": "poisoned",
        "knn_clean": "kNN, clean bank",
        "knn_poisoned": "poisoned",
        "knn_control": "control",
    }
    lines = [
        f"| run | {' | '.join(keys.values())} | training loss | hours |",
        "|---|" + "---|" * (len(keys) + 2),
    ]
    for cell in measured:
        found, result = row_of(cell, {"": Path()}, "").accuracies, cell["result"]
        values = [f"{found[key]:.1f}" if key in found else "-" for key in keys]
        told = [*values, f"{result['train_loss']:.3f}", f"{result['seconds'] / 3600:.1f}"]
        lines.append(f"| {_run(cell)} | {' | '.join(told)} |")
    curves_ = {_run(cell): cell["result"]["knn"] for cell in measured}
    curves_ |= {_run(cell): cell["knn"] for cell in newest.get("under_way", ())}
    steps = sorted({entry["step"] for curve in curves_.values() for entry in curve})
    lines += ["", f"| kNN, clean bank / poisoned / loss at step | {' | '.join(map(str, steps))} |"]
    lines.append("|---|" + "---|" * len(steps))
    for run, curve in curves_.items():
        points = {entry["step"]: entry for entry in curve}
        lines.append(f"| {run} | {' | '.join(_point(points.get(step)) for step in steps)} |")
    told_of = [_setting(newest), *_missing(newest), source(newest)]
    return "\n".join(
        [*lines, "", "The loss is the mean since the point before. " + told_of[0], *told_of[1:]]
    )


def _point(entry: Result | None) -> str:
    """Return what a monitor has seen at a step."""
    if entry is None:
        return "-"
    poisoned = entry.get("knn_poisoned_bank")
    banks = [entry["knn_clean_bank"], *([] if poisoned is None else [poisoned])]
    return " / ".join([*(f"{bank:.1f}" for bank in banks), f"{entry['loss']:.3f}"])


def _run(cell: Result) -> str:
    made_on = cell.get("surrogate_backbone") or cell["backbone"]
    source_ = f" ({cell['surrogate']}, {made_on})" if cell["surrogate"] else ""
    return f"{cell['victim']}, {cell['backbone']}, {cell['poison']}{source_}, seed {cell['seed']}"


def _by_step(rows: list[Row], key: str, steps: list[int]) -> list[list[float]]:
    """Return for each step the accuracies of all runs."""
    curves_ = [{entry["step"]: entry[key] for entry in row.curve if key in entry} for row in rows]
    return [[curve[step] for curve in curves_] for step in steps]


def _cost_and_gap(poison: str, costs: list[Result], gaps: list[Any], steps: list[int]) -> str:
    largest = max(range(len(gaps)), key=lambda number: gaps[number].mean)
    seconds = spread([row["craft_seconds"] for row in costs])
    return (
        f"- `{poison}`: {costs[0]['surrogate_steps']} steps of surrogates, "
        f"{costs[0]['image_passes']:,} image passes, {seconds} s; largest gap {gaps[largest]} at "
        f"step {steps[largest]}, {gaps[-1]} at the end."
    )


def _defended(rows: list[Row]) -> list[str]:
    """Return a line a defence and victim, and the undefended ones of the same seeds before them."""
    defended = [row for row in rows if row.defence != NONE]
    poisons = [name for name in dict.fromkeys(row.poison for row in defended) if name != NONE]
    if not poisons:
        return []
    seeds = sorted({row.seed for row in defended})
    lines = [
        f"**under a defence, seed {', '.join(map(str, seeds))}**: linear probe / kNN on the clean "
        "bank, kNN on the poisoned bank (control)",
        "",
        "| defence | victim | clean images | " + " | ".join(poisons) + " |",
        "|---|---|---|" + "---|" * len(poisons),
    ]
    known = {(row.defence, row.victim, row.poison): row for row in rows if row.seed in seeds}
    for defence in (NONE, *dict.fromkeys(row.defence for row in defended)):
        for victim in dict.fromkeys(row.victim for row in defended):
            found = [known.get((defence, victim, poison)) for poison in (NONE, *poisons)]
            if all(found):
                cells = (defence, victim, *map(_cell, found))
                lines.append("| " + " | ".join(cells) + " |")
    return [*lines, ""]


def _cell(row: Row) -> str:
    found = row.accuracies
    text = f"{found['linear_clean']:.1f} / {found['knn_clean']:.1f}"
    if "knn_poisoned" in found:
        text += f", {found['knn_poisoned']:.1f} ({found['knn_control']:.1f})"
    return text


def _surrogates(result: Result) -> str:
    steps: dict[str, set[int]] = {}
    for row in result["rows"]:
        if row["surrogate_steps"]:
            steps.setdefault(row["poison"], set()).add(row["surrogate_steps"])
    told = [f"{name} {'/'.join(map(str, sorted(found)))}" for name, found in steps.items()]
    return f"; surrogates: {', '.join(told)} steps" if steps else ""


LOST = {
    "linear_clean": "linear, clean bank",
    "knn_clean": "kNN, clean bank",
    "knn_poisoned": "kNN, poisoned bank",
}
"""What victims lost, in points: clean banks against the clean run, the poisoned one against the
control."""
ADVERSARIAL = ("tap", "aap")
"""Poisons that raise a loss."""


def readability(results: list[Result]) -> str:
    """How much lower victims' loss is than the clean run's, beside what they lost; correlations."""
    newest = results[-1]
    rows = _read_and_lost(newest)
    lines = [
        f"| poison | readability | lost: {' | '.join(LOST.values())} | victims |",
        "|---|" + "---|" * (len(LOST) + 2),
    ]
    for name, row in sorted(rows.items(), key=lambda item: -item[1]["readability"]):
        cells = (f"{row['readability']:+.3f}", *(f"{row[key]:+.1f}" for key in LOST))
        lines.append(f"| {name} | {' | '.join(cells)} | {row['victims']:.0f} |")
    told = []
    for kind, left_out in (("all", ()), ("without adversarial noise", ADVERSARIAL)):
        kept = [row for name, row in rows.items() if name not in left_out]
        found = (f"{title} {_rank_correlation(kept, key)}" for key, title in LOST.items())
        told.append(f"- {kind}, {len(kept)} poisons: {'; '.join(found)}")
    steps = min(entry["step"] for cell in _measured(newest) for entry in cell["result"]["knn"])
    setting = (
        f"Readability: how much lower the mean loss of the first {steps} steps is than that of "
        "the clean run of the same seed. Lost, in points: on the clean bank against that run, on "
        "the poisoned bank against the control. Rank correlations are Spearman's, with the 95 % "
        "interval of a bootstrap over poisons."
    )
    return "\n".join([*lines, "", *told, "", setting])


def _read_and_lost(result: Result) -> dict[str, dict[str, float]]:
    """Return readability and what was lost, poison by poison, the means over victims."""
    cells = _measured(result)
    clean = {cell["seed"]: cell for cell in cells if cell["kind"] == "clean"}
    found: dict[str, list[dict[str, float]]] = {}
    for cell in cells:
        if cell["kind"] == "clean" or cell["seed"] not in clean:
            continue
        untouched, mine = clean[cell["seed"]], row_of(cell, {"": Path()}, "").accuracies
        theirs = row_of(untouched, {"": Path()}, "").accuracies
        early = [one["result"]["knn"][0]["loss"] for one in (untouched, cell)]
        row = {key: theirs[key] - mine[key] for key in ("linear_clean", "knn_clean")}
        row["knn_poisoned"] = mine["knn_control"] - mine["knn_poisoned"]
        found.setdefault(cell["poison"], []).append(row | {"readability": early[0] - early[1]})
    return {
        name: {key: statistics.fmean(row[key] for row in rows) for key in rows[0]}
        | {"victims": len(rows)}
        for name, rows in found.items()
    }


def _rank_correlation(rows: list[dict[str, float]], lost: str) -> str:
    read = np.array([row["readability"] for row in rows])
    points = np.array([row[lost] for row in rows])

    def of(index: Any) -> float:
        return float(spearmanr(read[index], points[index]).statistic)

    drawn = np.random.default_rng(0).integers(len(rows), size=(5000, len(rows)))
    # A draw of one or two poisons again and again has no ranks worth the name.
    values = [of(index) for index in drawn if len(set(index.tolist())) > 2]
    low, high = np.nanquantile(values, [0.025, 0.975])
    return f"{of(np.arange(len(rows))):+.2f} ({low:+.2f} to {high:+.2f})"
