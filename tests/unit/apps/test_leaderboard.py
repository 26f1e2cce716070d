"""The leaderboard and the CSV file of a report, computed a second time by hand."""

from __future__ import annotations

import csv
import io
import json
import statistics
from pathlib import Path
from typing import Any

import pytest
import torch
from omegaconf import OmegaConf

from cp_plugin.apps.report.costs import cost, crafts_before
from cp_plugin.apps.report.csv_file import as_csv
from cp_plugin.apps.report.leaderboard import leaderboard
from cp_plugin.apps.report.rows import MEASURES, Row, find
from cp_plugin.attack.perturbation import Perturbation
from cp_plugin.attack.poison_file import Poison

LEFT: dict[tuple[str, str, str], list[float]] = {
    ("none", "simclr", "none"): [60.0, 61.0, 62.0],
    ("none", "byol", "none"): [58.0, 58.5, 59.0],
    ("random", "simclr", "none"): [59.0, 60.0, 61.0],
    ("random", "byol", "none"): [57.0, 58.0, 59.0],
    ("cp", "simclr", "none"): [30.0, 31.0, 32.0],
    ("cp", "byol", "none"): [56.0, 58.0, 57.0],
    ("cp", "simclr", "grey"): [50.0, 62.5, 60.0],
    ("weak", "simclr", "none"): [58.0, 60.0, 59.5],
    ("weak", "byol", "none"): [57.0, 58.0, 56.0],
    ("single", "simclr", "none"): [20.0],
}


def row(poison: str, victim: str, defence: str, seed: int, left: float, **facts: Any) -> Row:
    return Row(
        poison=poison,
        surrogate=None,
        victim=victim,
        backbone="tiny",
        defence=defence,
        seed=seed,
        folder=Path(),
        poison_file=None,
        accuracies={"linear_clean": left, "knn_clean": 1.0},
        curve=(),
        facts=facts,
    )


def rows() -> list[Row]:
    return [
        row(*axes, seed, value, image_passes=7 if axes[0] == "cp" else None)
        for axes, values in LEFT.items()
        for seed, value in enumerate(values)
    ]


def test_poisons_are_sorted_by_what_they_leave_in_the_worst_case() -> None:
    found = leaderboard(rows())
    assert found.title == MEASURES["linear_clean"]
    means = {axes: statistics.fmean(values) for axes, values in LEFT.items()}
    plain = {
        poison: max(mean for (name, _, defence), mean in means.items() if name == poison
                    and defence == "none")
        for poison, _, _ in LEFT
    }  # fmt: skip
    assert [place.poison for place in found.places] == sorted(plain, key=lambda name: plain[name])
    assert [place.undefended for place in found.places] == sorted(plain.values())
    by_name = {place.poison: place for place in found.places}
    cp = by_name["cp"]
    assert (cp.undefended_victim, cp.victims, cp.defences) == ("byol", 2, 1)
    assert (cp.worst, cp.worst_victim, cp.worst_defence) == (57.5, "simclr", "grey")
    assert (cp.image_passes, by_name["weak"].image_passes) == (7, None)


def test_what_is_within_scatter_of_random_noise_is_said_to_be() -> None:
    told = {place.poison: place.against_random for place in leaderboard(rows()).places}
    assert told == {
        "none": "",
        "random": "",
        "cp": "below it on 1 of 2 victims",  # SimCLR by 29, BYOL by 1 with errors of 0.8
        "weak": "within scatter on 2 victims",
        "single": "one seed: scatter is not known",
    }
    without = [one for one in rows() if one.poison != "random"]
    assert leaderboard(without).places[0].against_random == "no random noise was measured"


def test_a_backbone_has_places_of_its_own() -> None:
    larger = [Row(**{**vars(one), "backbone": "large"}) for one in rows()[:9]]
    found = leaderboard([*rows(), *larger])
    assert [place.backbone for place in found.places].count("large") == 2


def test_the_csv_has_a_line_a_run() -> None:
    text = as_csv([*rows(), row('a, "b"', "simclr", "none", 0, 5.0, eps=8 / 255)])
    lines = list(csv.DictReader(io.StringIO(text)))
    assert len(lines) == sum(map(len, LEFT.values())) + 1
    assert set(MEASURES) < set(lines[0])
    assert (lines[-1]["poison"], float(lines[-1]["eps"])) == ('a, "b"', 8 / 255)
    assert lines[-1]["linear_poisoned"] == lines[-1]["image_passes"] == ""


def test_pandas_loads_the_csv_in_one_line(tmp_path: Path) -> None:
    pandas = pytest.importorskip("pandas")
    (tmp_path / "report.csv").write_text(as_csv(rows()), "utf8")
    table = pandas.read_csv(tmp_path / "report.csv")
    means = table[table.defence.fillna("none") == "none"].groupby(["poison", "victim"])
    assert means.linear_clean.mean()["cp", "byol"] == pytest.approx(57)
    assert str(table.seed.dtype) == "int64"
    assert str(table.linear_clean.dtype) == "float64"


def craft(folder: Path, steps: dict[str, Any], seconds: float, **poison: Any) -> Path:
    folder.mkdir()
    schedule = {"model_steps": 4, "noise_steps": 2, "pgd_steps": 5, **steps}
    info = {"schedule": json.dumps(schedule)}
    delta = Perturbation(torch.zeros(2, 3, 8, 8), 8 / 255)
    Poison(delta, "class", classes=("a", "b"), info=info).save(folder / "poison.safetensors")
    node = {"poison": poison, "optimizer": {"batch_size": 10}}
    OmegaConf.save({**node, "augmentations": [{"num_crops": 2}]}, folder / "config.yaml")
    (folder / "result.json").write_text(json.dumps({"poison": "cp_class", "seconds": seconds}))
    return folder


def test_a_poison_costs_what_it_started_from_too(tmp_path: Path) -> None:
    """Batches of 10 images and 2 views: steps of the model and T steps on each batch of noise."""
    joint = {"noise_steps": 0, "surrogate_steps_done": 50, "noise_steps_done": 50}
    first = craft(tmp_path / "a", joint, 60)
    alternate = {"surrogate_steps_done": 8, "noise_steps_done": 20}
    init = str(first / "poison.safetensors")
    second = craft(tmp_path / "b", alternate, 30, init=init)
    chain = list(crafts_before(second))
    assert chain == [second, first]
    found = cost(chain)
    assert found is not None
    assert found.facts() == {"image_passes": 20 * (50 + 28), "craft_minutes": 1.5}
    ensemble = cost([craft(tmp_path / "c", alternate, 30, checkpoints=3)])
    assert ensemble is not None
    assert ensemble.image_passes == 20 * (8 + 3 * 20)
    older = cost([craft(tmp_path / "d", {"surrogate_steps_done": 8}, 30)])
    assert older is not None
    assert older.image_passes == 20 * (8 + 2 * 2 * 5)
    (first / "result.json").unlink()
    assert cost(chain) is None
    assert cost([]) is None


def test_a_folder_of_runs_tells_what_its_poisons_cost(tmp_path: Path) -> None:
    steps = {"surrogate_steps_done": 8, "noise_steps_done": 20}
    made = craft(tmp_path / "craft", steps, 30, name="cp_class")
    victim = tmp_path / "victim"
    victim.mkdir()
    poison = {"name": "inject", "path": str(made / "poison.safetensors")}
    OmegaConf.save({"poison": poison, "backbone": {"name": "r"}}, victim / "config.yaml")
    result = {"poison": "inject", "surrogate_steps": 8, "surrogate": "byol", "method": "simclr"}
    result |= {"seed": 3, "knn_clean_bank": 61.0, "knn": [{"step": 1, "knn_clean_bank": 61.0}]}
    (victim / "result.json").write_text(json.dumps(result))
    (row,) = find(tmp_path).rows
    assert (row.facts["image_passes"], row.facts["craft_minutes"]) == (560, 0.5)
