"""Fill the tables of the README files from the newest results: `python -m tests.bench.readme`.

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

from cp_plugin.apps.report.tables import spread
from cp_plugin.hosts.solo_learn import NEIGHBOURS_ONLY, NOT_SERVED
from tests.bench.provenance import RESULTS, source
from tests.bench.study_tables import (
    augment,
    curves,
    defended,
    long_runs,
    readability,
    reproduction,
    study,
    supervised,
)
from tests.support import lightly_examples
from tests.support.solo_served import MOMENTUM, SERVED

ROOT = Path(__file__).resolve().parents[2]
EXAMPLES = ROOT / "tests" / "examples" / "README.md"
PAGES = (ROOT / "README.md", EXAMPLES, RESULTS / "README.md")
Result = dict[str, Any]


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
    for result in {machine(result): result for result in results}.values():
        for row in result["speed"]:
            rate = row["images_per_second"]
            cells = (
                machine(result),
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
    return "\n".join([*lines, "", source(newest)])


def loader(results: list[Result]) -> str:
    """Images a second of every way in the newest run."""
    newest = results[-1]
    lines = ["| way | images a second | by processor time |", "|---|---|---|"]
    for row in newest["rows"]:
        rates = (row["images_per_second"], row["images_per_cpu_second"])
        lines.append(f"| {row['way']} | " + " | ".join(f"{rate:,.0f}" for rate in rates) + " |")
    return "\n".join([*lines, "", f"Two views an image, {newest['what']}. {source(newest)}"])


def demo(results: list[Result]) -> str:
    """Every row of the newest demo, seed by seed."""
    newest = results[-1]
    first = newest["rows"][0]
    setting = (
        f"SimCLR on {newest['data']}; k = {first['k']}, T = {first['temperature']}, "
        f"{first['victim_epochs']} epochs, eps 8/255. A demo took "
        f"{', '.join(f'{seconds:.0f}' for seconds in newest['seconds'])} s."
    )
    return "\n".join([_banks(newest["rows"]), "", setting, source(newest)])


def solo(results: list[Result]) -> str:
    """Every row of the newest run through solo-learn, seed by seed."""
    newest = results[-1]
    first = newest["rows"][0]
    setting = (
        f"{newest['what']}; k = {first['k']}, T = {first['temperature']:g}, cosine, "
        f"{first['victim_epochs']} epochs."
    )
    return "\n".join([_banks(newest["rows"]), "", setting, source(newest)])


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
    return "\n".join([*lines, "", told, setting, source(newest)])


def machine(result: Result) -> str:
    """Name the hardware of a result."""
    return str(result["provenance"]["hardware"])


def step(results: list[Result]) -> str:
    """A noise step of every method against its floor: the newest run on each machine."""
    lines = [
        "| machine | precision | method | ms | floor | times the floor | authors' code | times "
        "faster |",
        "|---|---|---|---|---|---|---|---|",
    ]
    newest = {(machine(result), result["precision"]): result for result in results}
    for (where, precision), result in newest.items():
        for row in result["rows"]:
            theirs, faster = row["official_seconds"], row["ratio_to_official"]
            cells = (
                where,
                precision,
                row["method"],
                f"{1e3 * row['seconds']:,.0f}",
                f"{1e3 * row['floor_seconds']:,.0f}",
                f"{row['ratio_to_floor']:.2f}",
                "-" if theirs is None else f"{1e3 * theirs:,.0f}",
                "-" if faster is None else f"{faster:.1f}",
            )
            lines.append("| " + " | ".join(cells) + " |")
    told = [
        f"{where}, {precision}: {result['what']}. {source(result)}"
        for (where, precision), result in newest.items()
    ]
    return "\n".join([*lines, "", "\n\n".join(told)])


def whole(results: list[Result]) -> str:
    """Whole crafts and victims over their bare passes, and where the rest goes."""
    newest = {machine(result): result for result in results}
    parts = list(results[-1]["rows"][0]["seconds_of"])
    lines = [
        "| machine | run | what | times the bare passes | by processor time | "
        f"{' | '.join(parts)} | loader, images a second |",
        "|---" * (len(parts) + 6) + "|",
    ]
    for where, row in ((where, row) for where, result in newest.items() for row in result["rows"]):
        spread = f"{row['times_bare_least']:.2f} to {row['times_bare_most']:.2f}"
        timed = sum(row["seconds_of"].values())  # a round with clocks, which is one of its own
        cells = (
            where,
            row["row"],
            row["kind"],
            f"{row['times_bare']:.2f} ({spread})",
            f"{row['times_bare_cpu']:.2f}",
            *(f"{100 * row['seconds_of'][part] / timed:.0f} %" for part in parts),
            f"{row['loader_images_per_second']:,.0f}",
        )
        lines.append("| " + " | ".join(cells) + " |")
    told = [
        f"{where}: {result['what']}; median (least to most) of {result['rows'][0]['pairs']} pairs, "
        f"precision {result['rows'][0]['precision']}; shares are of a round's time. "
        f"{source(result)}"
        for where, result in newest.items()
    ]
    return "\n".join([*lines, "", "\n\n".join(told)])


WAYS_TO_COMPLETE = (
    ("gram", "eigenvectors of the Gram matrices, batched"),
    ("svd", "torch.linalg.svd, batched"),
    ("numpy", "numpy.linalg.svd, a loop"),
)


def completion(results: list[Result]) -> str:
    """Matrix completion of a batch, and of a whole data set, in processor time."""
    newest = results[-1]
    lines = [
        "| way | one thresholding step, ms | a batch completed, ms | 4 completions of 50,000, s |",
        "|---|---|---|---|",
    ]
    for name, way in WAYS_TO_COMPLETE:
        step, whole = newest["step_ms"][name], newest["completion_ms"][name]
        share = whole["cpu"] / whole["median"]  # other work was on the machine
        cells = (
            way,
            f"{step['cpu']:.1f}",
            f"{whole['cpu']:,.0f}",
            f"{share * newest['completions_of_a_data_set_seconds'][name]:,.0f}",
        )
        lines.append("| " + " | ".join(cells) + " |")
    told = (
        f"Processor time, {newest['times_cpu']['svd']:.1f} times less than batched and "
        f"{newest['times_cpu']['numpy']:.1f} times less than single decompositions; largest "
        f"difference from the latter {newest['largest_difference']:.0e}. {newest['what']}."
    )
    return "\n".join([*lines, "", told, source(newest)])


def survival(results: list[Result]) -> str:
    """What is left of perturbations after each processing, in the newest run."""
    newest = results[-1]
    rows = {(row["craft"], row["processing"]): row for row in newest["rows"]}
    crafts, ways = (list(dict.fromkeys(names)) for names in zip(*rows, strict=True))
    titles = {"survive": "`--survive jpeg,resize`", "random": "random noise"}
    lines = [
        "| | " + " | ".join(titles.get(craft, craft) for craft in crafts) + " |",
        "|---" * (len(crafts) + 1) + "|",
    ]
    for way in ways:
        cells = [
            f"{rows[craft, way]['correlation']:.2f} / {rows[craft, way]['size']:.2f}"
            for craft in crafts
        ]
        lines.append("| " + " | ".join([way, *cells]) + " |")
    told = (
        "Correlation / size of protected minus original after the same processing of both, against "
        f"the same as published (1 / 1: nothing is lost); means over pictures. {newest['what']}."
    )
    return "\n".join([*lines, "", told, source(newest)])


def tomorrow(results: list[Result]) -> str:
    """What a poison does on pictures that come later, in the newest run: means over seeds."""
    newest = results[-1]
    columns = {
        "linear_clean": "linear, clean bank",
        "linear_published": "published",
        "linear_control": "control",
        "knn_clean": "kNN, clean bank",
        "knn_published": "published",
        "knn_control": "control",
    }
    lines = [
        f"| tomorrow's pictures | {' | '.join(columns.values())} |",
        "|---" * (len(columns) + 1) + "|",
    ]
    for name in dict.fromkeys(row["tomorrow"] for row in newest["rows"]):
        own = [row for row in newest["rows"] if row["tomorrow"] == name]
        cells = [
            str(spread([row[key] for row in own])) if key in own[0] else "-" for key in columns
        ]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    seeds = sorted({row["seed"] for row in newest["rows"]})
    told = (
        f"Percent; mean ± standard deviation of the sample over seeds {', '.join(map(str, seeds))}."
        f" {newest['pictures']} pictures, half of them protected in {newest['clusters']} clusters, "
        f"{newest['rounds']} epochs; victims of {newest['rows'][0]['steps']} steps "
        f"({newest['epochs']} epochs). *Originals*: nothing is protected, today's neither."
    )
    return "\n".join([*lines, "", told, source(newest)])


def store(results: list[Result]) -> str:
    """Peak memory and sizes of rows in a file, in the newest run."""
    newest = results[-1]
    titles = {
        "craft": "craft",
        "large_craft": "craft, two snapshots",
        "large_poison": "poison file written",
        "large_victim": "poison file opened, 50 rows read",
    }
    lines = [
        "| what | rows | of them visited | bytes that are addressed | on the disk | peak, MB | "
        "snapshots or poison, s |",
        "|---" * 7 + "|",
    ]
    for row in newest["rows"]:
        keys = ("write_seconds", "open_and_read_seconds")
        seconds = row.get("save_seconds") or [row[key] for key in keys if key in row]
        addressed = row.get("addressed_bytes") or row.get("row_bytes") or row.get("poison_bytes")
        disk = row.get("on_disk_bytes") or row.get("row_bytes")
        cells = (
            titles[row["case"]],
            f"{row['rows']:,}",
            f"{row['visited']:,}" if "visited" in row else "-",
            "-" if addressed is None else f"{addressed:,}",
            "-" if disk is None else f"{disk:,}",
            f"{row['peak_megabytes']:,.0f}",
            ", ".join(f"{one:.1f}" for one in seconds) or "-",
        )
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join([*lines, "", f"{newest['what']}. {source(newest)}"])


def stream(results: list[Result]) -> str:
    """Peak memory of crafts on streams, and how a keyed one differs from that by row."""
    newest = results[-1]
    titles = {
        "by_class": "a stream, class-wise",
        "by_key": "a stream, a row an image by key",
        "by_row": "a map-style data set, a row an image",
    }
    lines = ["| craft on | images | peak, MB | seconds of one processor |", "|---|---|---|---|"]
    for row in newest["rows"]:
        cells = (
            titles[row["case"]],
            f"{row['images']:,}",
            f"{row['peak_megabytes']:,.0f}",
            f"{row['cpu_seconds']:,.0f}",
        )
        lines.append("| " + " | ".join(cells) + " |")
    different = newest["values_that_differ_between_by_key_and_by_row"]
    text = f"Values of delta that differ between the two crafts of a row an image: {different}."
    return "\n".join([*lines, "", f"{text} {newest['what']}. {source(newest)}"])


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


def host_methods() -> str:
    """What the conformance suites of the other hosts run over, and what they leave out."""
    from tests.support.lightly_masked_modules import MASKED
    from tests.support.lightly_modules import MODULES
    from tests.support.spt_modules import FORWARDS, METHODS, REFUSED

    kinds = {
        "Lightly, methods that compare views": MODULES,
        "Lightly, methods that compare none or hide parts": MASKED,
        "`stable_pretraining.forward`": FORWARDS,
        "`stable_pretraining.methods`": METHODS,
    }
    lines = ["| modules of | in the suite | number | with a dual branch |", "|---|---|---|---|"]
    for kind, styles in kinds.items():
        names = ", ".join(f"`{style.name}`" for style in styles)
        dual = ", ".join(f"`{style.name}`" for style in styles if style.momentum) or "none"
        lines.append(f"| {kind} | {names} | {len(styles)} | {dual} |")
    left_out = [f"`{name}` is refused: {reason}." for name, reason in REFUSED.items()]
    of_forward = "Of `stable_pretraining.forward` " + " ".join(left_out)
    files = ", ".join(f"`{name}`" for name in lightly_examples.SERVED)
    reasons = [f"`{name}`: {reason}." for name, reason in lightly_examples.REFUSED.items()]
    of_examples = (
        f"{len(lightly_examples.SERVED)} files of Lightly's `examples/pytorch_lightning` are "
        f"crafted with as they stand: {files}. Refused: {' '.join(reasons)}"
    )
    return "\n".join([*lines, "", of_forward, "", of_examples])


def _errors(row: dict[str, float]) -> str:
    return f"{row['p99.9']:.2f} / {row['mean']:.2f} / {row['max']:.1f}"


THEMES: dict[str, Callable[[list[Result]], str]] = {
    "augment": augment,
    "cifar10": reproduction,
    "cifar10_long": long_runs,
    "cifar10_resnet18": long_runs,
    "cifar10_supervised": supervised,
    "completion": completion,
    "defences": defended,
    "demo": demo,
    "knn": knn,
    "loader": loader,
    "mirror": mirror,
    "photos": study,
    "protect": study,
    "readability": long_runs,
    "rows": study,
    "schedules": curves,
    "solo": solo,
    "step": step,
    "store": store,
    "stream": stream,
    "survival": survival,
    "tomorrow": tomorrow,
    "whole": whole,
}
LISTS: dict[str, Callable[[], str]] = {"solo-methods": solo_methods, "host-methods": host_methods}


def results_of(theme: str) -> list[Result]:
    """Read the results of a theme, oldest first."""
    # `cifar10_supervised_….json` is none of the theme `cifar10`.
    longer = tuple(f"{name}_" for name in THEMES if name.startswith(f"{theme}_"))
    paths = [path for path in RESULTS.glob(f"{theme}_*.json") if not path.name.startswith(longer)]
    found = [json.loads(path.read_text()) for path in sorted(paths)]
    return sorted(found, key=lambda result: str(result["provenance"]["date"]))


def fill(text: str, theme: str, table: str) -> str:
    """Replace what stands between the marks of a theme; a text without marks stays as it is."""
    begin, end = f"<!-- {theme}:begin -->", f"<!-- {theme}:end -->"
    pattern = re.compile(re.escape(begin) + ".*?" + re.escape(end), re.DOTALL)
    return pattern.sub(lambda _: f"{begin}\n{table}\n{end}", text)


def main() -> None:
    """Fill every list, and every theme that has results, on every page."""
    tables = {theme: make(found) for theme, make in THEMES.items() if (found := results_of(theme))}
    if read := results_of("readability"):  # two tables of one result
        tables["readability-order"] = readability(read)
    tables |= {name: listed() for name, listed in LISTS.items()}
    for page in PAGES:
        text = page.read_text(encoding="utf8")
        for theme, table in tables.items():
            text = fill(text, theme, table)
        page.write_text(text, encoding="utf8")


if __name__ == "__main__":
    main()
