"""The command line: `cp-plugin demo | pretrain | evaluate | study | report | …`."""

from __future__ import annotations

import json
import logging
import sys
import warnings
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.logging import RichHandler
from rich.table import Table

from cp_plugin.config.settings import UserError, check_eps, number, one_of
from cp_plugin.util.whole_files import is_no_room, no_room_sentence

app = typer.Typer(
    help="Contrastive poisoning for self-supervised learning.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
)
PASS_ON = {"allow_extra_args": True, "ignore_unknown_options": True}


@app.command()
def demo(
    out: Annotated[Path, typer.Option(help="A new folder for everything the demo makes.")] = Path(
        "cp-demo"
    ),
    seed: Annotated[int, typer.Option(help="Seed of the whole demo.")] = 0,
) -> None:
    """Craft CP-C and CP-S on embedded photographs, train victims, and show what the poisons did."""
    from cp_plugin.apps.demo import demo as run_demo

    run_demo(out, seed)


@app.command(context_settings=PASS_ON)
def pretrain(context: typer.Context) -> None:
    """Train on the embedded engine, by Hydra: `--config-name simclr +poison=cp +monitor=knn`."""
    from cp_plugin.apps.hydra_app import main as run_hydra

    run_hydra(context.args)


@app.command()
def evaluate(
    checkpoint: Annotated[
        Path, typer.Argument(help="A checkpoint, or the folder of a run; see --readability.")
    ],
    poison: Annotated[Path | None, typer.Option(help="Poison of the poisoned bank.")] = None,
    data: Annotated[Path | None, typer.Option(help="Another folder of images as bank.")] = None,
    test: Annotated[Path | None, typer.Option(help="Another folder of test images.")] = None,
    k: Annotated[int | None, typer.Option(help="Neighbours.")] = None,
    temperature: Annotated[float, typer.Option(help="Of the votes.")] = 0.07,
    probe: Annotated[
        str, typer.Option(help="Linear probe: cosine, ours; paper, the authors' too; none.")
    ] = "cosine",
    finetune: Annotated[
        float | None, typer.Option(help="Fine-tune too, on this part of each class's labels.")
    ] = None,
    readability: Annotated[
        bool,
        typer.Option(help="Take a poison file; how soon do fresh surrogates discover it?"),
    ] = False,
    run: Annotated[
        Path | None, typer.Option(help="Run whose surrogate reads; default: the poison's own.")
    ] = None,
    steps: Annotated[int, typer.Option(help="Steps of each reading surrogate.")] = 300,
    seeds: Annotated[int, typer.Option(help="How many surrogates read each kind of image.")] = 3,
    as_json: Annotated[bool, typer.Option("--json", help="JSON on standard output.")] = False,
) -> None:
    """Measure an encoder: kNN, linear probe, fine-tuning, on the clean and the poisoned bank.

    With `--readability` a poison: how much lower a fresh surrogate's loss is than on clean images.
    """
    if readability:
        _readability(checkpoint, run, steps, seeds, as_json)
        return
    from cp_plugin.apps.evaluate_run import evaluate as measure
    from cp_plugin.attack.poison_file import Poison

    chosen = Poison.load(poison) if poison else None
    rows = measure(checkpoint, chosen, k, temperature, probe, data, test, finetune)
    if as_json:
        print(json.dumps(rows, indent=1))
        return
    tuned = [f"{finetune:.0%} fine-tuned, last", "best"] if finetune else []
    own = ["own classifier"] if "classifier" in rows[0] else []
    probes = [name for name in ("linear", "linear_paper") if name in rows[0]]
    figures = [
        (f"linear ({rows[0][name]['protocol']}), {which}", name, which)
        for name in probes
        for which in ("last", "best")
    ]
    titles = [title for title, _, _ in figures]
    table = Table("bank", "kNN", "k", "T", "distance", *titles, *tuned, *own, "images")
    for row in rows:
        near = row["knn"]
        table.add_row(
            row["bank"],
            f"{near['accuracy']:.1f} %",
            str(near["k"]),
            str(near["temperature"]),
            near["distance"],
            *(f"{row[name][which]:.1f} %" for _, name, which in figures),
            *(f"{row['finetune'][which]:.1f} %" for which in ("last", "best") if finetune),
            *(f"{row['classifier']:.1f} %" if "classifier" in row else "" for _ in own),
            str(near["bank_size"]),
        )
    Console().print(table)


def _readability(poison: Path, run: Path | None, steps: int, seeds: int, as_json: bool) -> None:
    from cp_plugin.apps.evaluate_run import read_by_surrogates
    from cp_plugin.engine.readability import CLEAN

    found = read_by_surrogates(poison, run, steps, seeds)
    rows = [
        {"images": kind, "losses": losses, "drop": found.mean(kind), "std": found.scatter(kind)}
        for kind, losses in found.losses.items()
    ]
    if as_json:
        print(json.dumps({"steps": found.steps, "seeds": found.seeds, "rows": rows}, indent=1))
        return
    table = Table("images", "loss", "lower than clean by", "std over seeds", "steps", "seeds")
    for row, losses in zip(rows, found.losses.values(), strict=True):
        clean = row["images"] == CLEAN
        table.add_row(
            str(row["images"]),
            f"{sum(losses) / len(losses):.3f}",
            "" if clean else f"{row['drop']:+.3f}",
            "" if clean or row["std"] is None else f"{row['std']:.3f}",
            str(found.steps),
            str(len(found.seeds)),
        )
    Console().print(table)


@app.command()
def export(
    poison: Annotated[Path, typer.Argument(help="The poison file.")],
    out: Annotated[Path, typer.Argument(help="A new folder.")],
    data: Annotated[
        Path | None, typer.Option(help="Clean images; default: the run's own data set.")
    ] = None,
) -> None:
    """Write the images with their poison as an image folder of 8-bit PNG files."""
    from cp_plugin.apps.export import export as write

    print(f"{write(poison, out, data)} images in {out}")


@app.command()
def protect(
    paths: Annotated[list[Path], typer.Argument(help="Folders or files, then a new folder OUT.")],
    size: Annotated[int, typer.Option(help="Side of the perturbation's grid.")] = 224,
    eps: Annotated[str, typer.Option(help="Largest change of a pixel, in [0, 1].")] = "8/255",
    minutes: Annotated[float, typer.Option(help="For everything; sets how long it crafts.")] = 20,
    rounds: Annotated[
        int | None, typer.Option(help="Epochs over the pictures, instead of --minutes.")
    ] = None,
    with_: Annotated[
        Path | None, typer.Option("--with", help="A poison to use; nothing is crafted.")
    ] = None,
    clusters: Annotated[
        int, typer.Option(help="Groups of like pictures that share a perturbation; 0: none do.")
    ] = 10,
    method: Annotated[
        str, typer.Option(help="What crafts it: simclr, mocov2plus or byol.")
    ] = "simclr",
    format: Annotated[
        str, typer.Option(help="png: lossless; same: JPEG, WebP and TIFF files stay so.")
    ] = "png",
    skip_unreadable: Annotated[
        bool, typer.Option("--skip-unreadable", help="Leave out what cannot be protected.")
    ] = False,
    survive: Annotated[
        list[str] | None,
        typer.Option(help="jpeg, resize: craft through it, so that the perturbation lasts."),
    ] = None,
    seed: Annotated[int, typer.Option(help="Seed of the craft.")] = 0,
    override: Annotated[
        list[str] | None,
        typer.Option("--set", help="A setting of the craft, as backbone.name=timm/convnext_atto."),
    ] = None,
    check: Annotated[
        bool, typer.Option("--check", help="Then train two small networks to see what it does.")
    ] = False,
    check_minutes: Annotated[float, typer.Option(help="For --check, beyond --minutes.")] = 10,
) -> None:
    """Protect pictures: IN… OUT, the same tree and sizes, each pixel changed by at most eps.

    The poison goes to OUT-poison; keep it to yourself: who has it can take it off again.
    """
    from cp_plugin.apps.protect import protect as run_protect
    from cp_plugin.apps.protect.plan import Settings

    if len(paths) < 2:
        raise UserError("give folders or files of pictures, and then a new folder for the result.")
    one_of("format", format, ("png", "same"), "--")
    settings = Settings(
        eps=check_eps(_number(eps, "--eps")),
        size=size,
        minutes=minutes,
        rounds=rounds,
        clusters=clusters or None,
        method=method,
        survive=tuple(survive or ()),
        seed=seed,
        overrides=tuple(override or ()),
    )
    *sources, out = paths
    file_format: Any = format
    if check:
        _check_enough(sources, out)
    count = run_protect(sources, out, settings, with_, file_format, skip_unreadable)
    print(f"{count} protected pictures in {out}")
    if check:
        _check_protected(sources, out, settings, with_, file_format, check_minutes)


def _check_enough(sources: list[Path], out: Path) -> None:
    """Check, before hours of crafting, that there are pictures enough to learn something from."""
    from cp_plugin.apps.protect.sources import sources_of
    from cp_plugin.apps.protect.split import check_enough

    check_enough(len(sources_of(sources, out)))


def _check_protected(
    sources: list[Path],
    out: Path,
    settings: Any,
    poison: Path | None,
    file_format: Any,
    minutes: float,
) -> None:
    from cp_plugin.apps.protect import work_folder
    from cp_plugin.apps.protect.check import CHECK, sentence
    from cp_plugin.apps.protect.check import check as run_check
    from cp_plugin.apps.protect.sources import sources_of
    from cp_plugin.apps.protect.split import Split
    from cp_plugin.attack.poison_file import Poison
    from cp_plugin.util.run_files import POISON_FILE

    work = work_folder(out)
    split = Split.of(sources_of(sources, out), out, file_format)
    found = run_check(split, work, settings, Poison.load(poison or work / POISON_FILE), minutes)
    table = Table("trained on", "bank", "kNN", "linear probe")
    for row in found["rows"]:
        table.add_row(
            row["trained_on"], row["bank"], f"{row['knn']:.1f} %", f"{row['linear']:.1f} %"
        )
    Console().print(table)
    print(sentence(found))
    print(f"all figures: {work / CHECK}.json")


def _number(text: str, name: str) -> float:
    try:
        return number(text)
    except ValueError:
        raise UserError(f"{name} must be a number such as 8/255, got {text!r}.") from None


@app.command()
def inspect(
    poison: Annotated[Path, typer.Argument(help="The poison file.")],
    picture: Annotated[
        Path | None, typer.Option(help="PNG to write; default: beside the poison.")
    ] = None,
    data: Annotated[
        Path | None, typer.Option(help="For --separability; default: the run's own data set.")
    ] = None,
    separability: Annotated[
        bool,
        typer.Option(
            "--separability", help="Does a linear classifier tell classes from delta alone?"
        ),
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="JSON on standard output.")] = False,
) -> None:
    """Show what a poison file holds, what delta is like, its budget and a picture."""
    from cp_plugin.apps.inspect import inspect as look

    facts = look(poison, picture, data, separability)
    if as_json:
        print(json.dumps(facts, indent=1))
        return
    table = Table("field", "value", show_header=False)
    for name, value in facts.items():
        shown = ", ".join(map(str, value)) if isinstance(value, list) else str(value)
        table.add_row(name, shown)
    Console().print(table)


@app.command("import")
def import_(
    file: Annotated[Path, typer.Argument(help="The authors' .pth file.")],
    out: Annotated[Path, typer.Argument(help="The poison file to write, .safetensors.")],
    dataset: Annotated[str, typer.Option(help="As data.dataset.")] = "cifar10",
    data: Annotated[Path | None, typer.Option(help="Where the data set is.")] = None,
    eps: Annotated[str, typer.Option(help="Budget of the poison, in [0, 1].")] = "8/255",
) -> None:
    """Convert a poison of the authors' code (github.com/kaiwenzha/contrastive-poisoning)."""
    from cp_plugin.apps.export import import_poison

    poison = import_poison(file, out, dataset, data, _number(eps, "--eps"))
    print(f"{len(poison.perturbation)} rows, one a {poison.granularity}, in {out}")


@app.command(context_settings=PASS_ON)
def study(
    context: typer.Context,
    config: Annotated[
        str, typer.Argument(help="A YAML file, or the name of a study that comes along: photos.")
    ],
    out: Annotated[
        Path | None, typer.Option(help="The study's folder; default: cp-study-NAME.")
    ] = None,
) -> None:
    """Run a grid of poisons, victims and defences; the same command goes on where it was.

    What follows is for Hydra, such as `hydra/launcher=joblib hydra.launcher.n_jobs=2`.
    """
    from cp_plugin.apps.study import study as run_study

    result = run_study(config, out, context.args)
    for name, reason in result["unfinished"].items():
        print(f"cp-plugin: {name} has no result: {reason}", file=sys.stderr)
    if result["unfinished"]:
        raise typer.Exit(1)


@app.command()
def report(
    folder: Annotated[Path, typer.Argument(help="Of a study, a demo, or any runs.")],
    out: Annotated[Path | None, typer.Option(help="Where the files go; default: there.")] = None,
    features: Annotated[
        str, typer.Option(help="Maps of features: pca, or tsne by scikit-learn.")
    ] = "pca",
) -> None:
    """Write one HTML page and a Markdown file: tables, curves, images, spectra, features."""
    from cp_plugin.apps.report import report as write

    for file in write(folder, out, features):
        print(file)


@app.command()
def doctor() -> None:
    """Show versions, hosts, patches, faiss and device; what is missing and how to get it."""
    from cp_plugin.apps.doctor import check, examine

    findings = examine()
    table = Table("", "found", "what to do")
    for finding in findings:
        table.add_row(*finding)
    Console().print(table)
    check(findings)


def main() -> None:
    """Run the command line; a user's mistake is one sentence and exit code 2."""
    _quiet()
    try:
        app()
    except UserError as error:
        sentence = str(error).rsplit("UserError: ", 1)[-1].strip()
        print(f"cp-plugin: {sentence}", file=sys.stderr)
        sys.exit(2)
    except Exception as error:
        if not is_no_room(error):
            raise
        print(f"cp-plugin: {no_room_sentence(error)}", file=sys.stderr)
        sys.exit(2)


def _quiet() -> None:
    """Show the project's own messages, and only such warnings as a user can act on."""
    handler = RichHandler(console=Console(stderr=True), show_path=False, show_time=False)
    own = logging.getLogger("cp_plugin")
    own.setLevel(logging.INFO)
    own.handlers, own.propagate = [handler], False
    warnings.filterwarnings("ignore", module="lightning")


if __name__ == "__main__":
    main()
