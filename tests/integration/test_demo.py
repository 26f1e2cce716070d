"""The demo is a study: what it runs, and what it shows of it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from cp_plugin.apps import demo
from cp_plugin.apps.report.rows import find
from cp_plugin.apps.study.plan import plan
from cp_plugin.apps.study.settings import read
from cp_plugin.util.paths import shipped
from tests.support.applications import Ran, custom

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*does not have many workers.*"),
    pytest.mark.filterwarnings("ignore:.*`isinstance.treespec, LeafSpec.*"),
]


def test_the_shipped_study_hands_cp_c_through_young_surrogates() -> None:
    cells = plan(read("demo")).values()
    crafts = [cell for cell in cells if cell.kind == "craft"]
    assert [cell.poison for cell in crafts] == ["cp_class", "cp_sample"]
    assert crafts[1].needs == {"poison": crafts[0].name}
    (restarts,) = (one for one in crafts[0].overrides if one.startswith("poison.restarts="))
    assert int(restarts.partition("=")[2]) >= 4
    measured = [cell for cell in cells if cell.victim]
    assert [cell.poison for cell in measured] == ["none", "random", "cp_class", "cp_sample"]
    assert {cell.probe for cell in measured} == {"none"}


@pytest.mark.slow
def test_a_short_demo_shows_every_run_and_a_table(
    call: Callable[..., Ran],
    image_folder: Callable[..., Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    values = yaml.safe_load((shipped("configs") / "pretrain/study/demo.yaml").read_text())
    own = custom(image_folder("train", 3, 8), image_folder("val", 3, 4))
    values["base"] += [*own, "optimizer.batch_size=8", "backbone.kwargs.channels=[8,8,8,8]"]
    values["victim"] = ["max_epochs=1"]
    short = ["poison.rounds=2", "poison.model_steps=2"]
    values["poisons"]["cp_class"]["settings"] += [*short, "poison.restarts=1"]
    values["poisons"]["cp_sample"]["settings"] += short
    file = tmp_path / "demo.yaml"
    file.write_text(yaml.safe_dump(values))
    monkeypatch.setattr(demo, "STUDY", str(file))
    made = call("demo", "--out", "out", "--seed", "3")
    assert made.code == 0, made.err
    assert made.out.startswith("It shows a poisoned bank under crops and flips")
    names = [cell.name.replace("-0", "-3") for cell in plan(read(str(file))).values()]
    for number, name in enumerate(names, start=1):
        assert f"{number} of {len(names)}: {name}" in made.err
    result: dict[str, Any] = json.loads((tmp_path / "out" / "result.json").read_text())
    rows = {row["poison"]: row for row in result["rows"]}
    assert list(rows) == ["none", "random", "cp_class", "cp_sample"]
    assert [row["surrogate_steps"] for row in rows.values()] == [None, None, 8, 12]
    assert [row["surrogates"] for row in rows.values()] == [None, None, 2, 3]
    assert {row["seed"] for row in rows.values()} == {3}
    assert {row["victim_steps"] for row in rows.values()} == {3}
    for name, row in rows.items():
        assert f" {row['knn_clean_bank']:.1f} " in made.out
        for key in ("knn_poisoned_bank", "knn_poisoned_bank_clean_encoder"):
            assert (row[key] is None) == (name == "none")
    for name in ("cp_class", "cp_sample"):
        assert (tmp_path / "out" / f"{name}.safetensors").is_file()
        assert (tmp_path / "out" / f"{name}.png").is_file()
    reported = {row.poison: row.accuracies for row in find(tmp_path / "out").rows}
    for name, row in rows.items():
        assert reported[name].get("knn_control") == row["knn_poisoned_bank_clean_encoder"]
