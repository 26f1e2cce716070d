"""Fill the README's tables from the newest results: `python -m tests.bench.readme`.

Text between `<!-- theme:begin -->` and `<!-- theme:end -->` is replaced. A theme is a function in
`THEMES` that turns the result files of that name into Markdown, or one in `LISTS`, which needs no
result: it says what the code serves and refuses.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from cp_plugin.adapters.solo import NEIGHBOURS_ONLY, NOT_SERVED
from cp_plugin.report.rows import NONE, Row, row_of
from cp_plugin.report.tables import markdown, tables
from tests.bench.passport import RESULTS
from tests.solo_served import MOMENTUM, SERVED

README = Path(__file__).resolve().parents[2] / "README.md"
Result = dict[str, Any]
STUDY_MEASURES = ("linear_clean", "knn_clean", "knn_poisoned", "knn_control")


def mirror(results: list[Result]) -> str:
    """Errors against Pillow of the newest run; speed and memory of the newest on each machine."""
    newest = results[-1]
    lines = [
        "Errors against Pillow with the same drawn parameters, in 1/255 (99.9th percentile / "
        "mean / maximum), on photographs:",
        "",
        "| transform | pixels | mirror | kornia |",
        "|---|---|---|---|",
    ]
    for row in newest["accuracy"]:
        theirs = _errors(row["kornia"]) if "kornia" in row else "-"
        cells = (row["transform"], row["size"], _errors(row["mirror"]), theirs)
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    lines += [
        "",
        "One view, forward and backward (Pillow: forward only, one process), images a second, "
        "median of runs in turns; how many times kornia's, by the clock and by processor time; "
        "peak memory of two views in batches:",
        "",
        "| machine | pipeline | batch | mirror | kornia | times | processor | Pillow | memory |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for result in {result["passport"]["hardware"]: result for result in results}.values():
        for row in result["speed"]:
            rate = row["images_per_second"]
            cells = (
                result["passport"]["hardware"],
                f"{row['pipeline']}, {row['size']} px",
                row["batch"],
                f"{rate['mirror']:,.0f}",
                f"{rate['kornia']:,.0f}",
                f"{row['times_kornia']:.1f}",
                f"{row['times_kornia_cpu']:.1f}",
                f"{rate['pillow, forward only']:,.0f}",
                f"{row['peak_memory_in_batches_two_views']:.1f}",
            )
            lines.append("| " + " | ".join(map(str, cells)) + " |")
    return "\n".join([*lines, "", _source(newest)])


def loader(results: list[Result]) -> str:
    """Images a second of every way in the newest run."""
    newest = results[-1]
    lines = ["| way | images a second | by processor time |", "|---|---|---|"]
    for row in newest["rows"]:
        rates = (row["images_per_second"], row["images_per_cpu_second"])
        lines.append(f"| {row['way']} | " + " | ".join(f"{rate:,.0f}" for rate in rates) + " |")
    return "\n".join([*lines, "", f"Two views an image, {newest['what']}. {_source(newest)}"])


def demo(results: list[Result]) -> str:
    """Every row of the newest demo, seed by seed."""
    newest = results[-1]
    first = newest["rows"][0]
    setting = (
        f"SimCLR on {newest['data']}; k = {first['k']}, T = {first['temperature']}, "
        f"{first['victim_epochs']} epochs, eps 8/255. A demo took "
        f"{', '.join(f'{seconds:.0f}' for seconds in newest['seconds'])} s."
    )
    return "\n".join([_banks(newest["rows"]), "", setting, _source(newest)])


def solo(results: list[Result]) -> str:
    """Every row of the newest run through solo-learn, seed by seed."""
    newest = results[-1]
    first = newest["rows"][0]
    setting = (
        f"{newest['what']}; k = {first['k']}, T = {first['temperature']:g}, cosine, "
        f"{first['victim_epochs']} epochs."
    )
    return "\n".join([_banks(newest["rows"]), "", setting, _source(newest)])


def _banks(rows: list[Result]) -> str:
    """Return a table of victims: accuracy on both banks, the control, the steps."""
    lines = [
        "| seed | poison | clean bank | poisoned bank | control | victim's steps | "
        "surrogates' steps |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        keys = ("knn_clean_bank", "knn_poisoned_bank", "knn_poisoned_bank_clean_encoder")
        accuracies = ["-" if row[key] is None else f"{row[key]:.1f}" for key in keys]
        steps = (row["victim_steps"], row.get("surrogate_steps") or "-")
        cells = (row["seed"], row["poison"], *accuracies, *steps)
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    return "\n".join(lines)


def knn(results: list[Result]) -> str:
    """Seconds and accuracy of every way in the newest run."""
    newest = results[-1]
    lines = [
        "| way | seconds | times Lightly's | times solo-learn's | accuracy | other votes | MB |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in newest["rows"]:
        times = [row.get(key) for key in ("times_lightly", "times_solo_learn")]
        unlike = row["votes_unlike_flat"]
        cells = (
            row["way"],
            f"{row['seconds']:.2f}",
            *("-" if value is None else f"{value:.1f}" for value in times),
            f"{row['accuracy']:.2f}",
            "-" if unlike is None else unlike,
            "-" if row["peak_megabytes"] is None else f"{row['peak_megabytes']:,.0f}",
        )
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    cost = newest["monitor"]
    told = (
        f"One evaluation of the monitor beside an epoch of {cost['epoch_seconds']:,.0f} s: search "
        f"in both banks {cost['search_percent_of_an_epoch']:.1f} %, features of both and of the "
        f"queries {cost['features_percent_of_an_epoch']:.1f} %; every {cost['every_n_epochs']} "
        f"epochs {cost['percent_of_training']:.1f} % of training."
    )
    setting = f"{newest['what']}; MB: held while searching, beyond the features."
    return "\n".join([*lines, "", told, setting, _source(newest)])


def step(results: list[Result]) -> str:
    """A noise step of every method against its floor: the newest run in each precision."""
    lines = [
        "| precision | method | seconds | floor | times the floor | authors' code | times faster |",
        "|---|---|---|---|---|---|---|",
    ]
    newest = {result["precision"]: result for result in results}
    for precision, result in newest.items():
        for row in result["rows"]:
            theirs, faster = row["official_seconds"], row["ratio_to_official"]
            cells = (
                precision,
                row["method"],
                f"{row['seconds']:.2f}",
                f"{row['floor_seconds']:.2f}",
                f"{row['ratio_to_floor']:.2f}",
                "-" if theirs is None else f"{theirs:.2f}",
                "-" if faster is None else f"{faster:.1f}",
            )
            lines.append("| " + " | ".join(cells) + " |")
    last = results[-1]
    return "\n".join([*lines, "", f"{last['what']}. {_source(last)}"])


def completion(results: list[Result]) -> str:
    """Matrix completion of a batch, and of a whole data set."""
    newest = results[-1]
    lines = [
        "| way | one thresholding step, ms | a batch completed, ms | 4 completions of 50,000, s |",
        "|---|---|---|---|",
    ]
    for name, way in (("products", "matrix products, batched"), ("numpy", "numpy, a loop")):
        cells = (
            way,
            f"{newest['step_ms'][name]['median']:.1f}",
            f"{newest['completion_ms'][name]['median']:,.0f}",
            f"{newest['completions_of_a_data_set_seconds'][name]:,.0f}",
        )
        lines.append("| " + " | ".join(cells) + " |")
    told = (
        f"{newest['times_numpy']:.1f} times faster by the clock; largest difference between the "
        f"two {newest['largest_difference']:.0e}. {newest['what']}."
    )
    return "\n".join([*lines, "", told, _source(newest)])


def solo_methods() -> str:
    """Every method of solo-learn: what the conformance suite serves, what is refused and why."""
    lines = ["| method | served | momentum branch |", "|---|---|---|"]
    for name in sorted(SERVED):
        branch = "dual branch" if name in MOMENTUM else "none"
        if name in NEIGHBOURS_ONLY:
            branch = "picks neighbours only: no gradient goes through it"
        lines.append(f"| `{name}` | yes | {branch} |")
    lines += [f"| `{name}` | no: {reason} | - |" for name, reason in sorted(NOT_SERVED.items())]
    return "\n".join(lines)


def study(results: list[Result]) -> str:
    """Accuracies of the newest study, defence by defence, with the worst case over victims."""
    newest = results[-1]
    measured = [cell for cell in newest["cells"] if cell["kind"] != "craft"]
    rows = [row_of(cell, {"": Path()}, "") for cell in measured]
    lines = []
    for table in tables([row for row in rows if row.defence == NONE]):
        if table.measure in STUDY_MEASURES:
            lines += [f"**{table.title}**", "", markdown(table), ""]
    lines += _defended(rows)
    steps = sorted({cell["result"]["steps"] for cell in measured})
    near, linear = (measured[0]["banks"][0][key] for key in ("knn", "linear"))
    setting = (
        f"Percent; mean ± standard deviation of the sample over seeds "
        f"{', '.join(map(str, sorted({row.seed for row in rows})))} (a bare figure: one seed). "
        f"Victims of {', '.join(map(str, steps))} steps; surrogates: {_surrogates(newest)}. "
        f"kNN: k = {near['k']}, T = {near['temperature']}, cosine; linear probe: "
        f"{linear['epochs']} epochs, last epoch."
    )
    missing = [f"`{name}`: {reason}" for name, reason in newest["unfinished"].items()]
    without = ["Without a result: " + "; ".join(missing) + "."] if missing else []
    return "\n".join([*lines, setting, *without, _source(newest)])


def _defended(rows: list[Row]) -> list[str]:
    """Return a line a defence and victim, and the undefended ones of the same seeds before them."""
    defended = [row for row in rows if row.defence != NONE]
    if not defended:
        return []
    poisons = [name for name in dict.fromkeys(row.poison for row in defended) if name != NONE]
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
    told = (f"{name} {'/'.join(map(str, sorted(found)))}" for name, found in steps.items())
    return ", ".join(told) + " steps"


def _errors(row: dict[str, float]) -> str:
    return f"{row['p99.9']:.2f} / {row['mean']:.2f} / {row['max']:.1f}"


def _source(result: Result) -> str:
    passport = result["passport"]
    versions = ", ".join(f"{name} {number}" for name, number in passport["versions"].items())
    return (
        f"`{passport['command']}` at {passport['commit']}, {passport['date']}, "
        f"{passport['hardware']}; {versions}."
    )


THEMES: dict[str, Callable[[list[Result]], str]] = {
    "cifar10": study,
    "completion": completion,
    "demo": demo,
    "knn": knn,
    "loader": loader,
    "mirror": mirror,
    "photos": study,
    "solo": solo,
    "step": step,
}
LISTS: dict[str, Callable[[], str]] = {"solo-methods": solo_methods}


def results_of(theme: str) -> list[Result]:
    """Read the results of a theme, oldest first."""
    found = [json.loads(path.read_text()) for path in sorted(RESULTS.glob(f"{theme}_*.json"))]
    return sorted(found, key=lambda result: str(result["passport"]["date"]))


def fill(text: str, theme: str, table: str) -> str:
    """Replace what stands between the marks of a theme; a text without marks stays as it is."""
    begin, end = f"<!-- {theme}:begin -->", f"<!-- {theme}:end -->"
    pattern = re.compile(re.escape(begin) + ".*?" + re.escape(end), re.DOTALL)
    return pattern.sub(lambda _: f"{begin}\n{table}\n{end}", text)


def main() -> None:
    """Fill every list, and every theme that has results."""
    text = README.read_text()
    for theme, make in THEMES.items():
        results = results_of(theme)
        if results:
            text = fill(text, theme, make(results))
    for name, listed in LISTS.items():
        text = fill(text, name, listed())
    README.write_text(text)


if __name__ == "__main__":
    main()
