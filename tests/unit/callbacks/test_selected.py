"""The callbacks of a run are made in one place, from the settings as they are."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from cp_plugin.callbacks import (
    CraftAap,
    CraftAue,
    CraftErrorMin,
    CraftPil,
    CraftPoison,
    CraftSep,
    CraftTap,
    CraftTue,
    Defence,
    KNNMonitor,
)
from cp_plugin.callbacks.selected import selected_callbacks
from cp_plugin.config.baselines import RandomConfig, TapConfig
from cp_plugin.config.defences import CutoutConfig, NoiseConfig
from cp_plugin.config.selection import Selection
from cp_plugin.config.settings import CraftConfig, MonitorConfig, UserError

FULL: tuple[Any, ...] = (
    {"name": "random", "eps": "4/255"},
    {"name": "knn", "k": 5},
    {"name": "noise", "std": 0.1},
)


def names(callbacks: list[Any]) -> list[str]:
    return [type(callback).__name__ for callback in callbacks]


def test_a_selection_gives_the_same_callbacks_whoever_asks(tmp_path: Path) -> None:
    selection = Selection.of(*FULL)
    for sets in ({}, {"bank": [0], "query": [0]}):
        made = selected_callbacks(selection, tmp_path, "mirror", **sets)
        assert names(made) == ["NoisePoison", "Defence", "MirrorViews", "KNNMonitor", "Journal"]


def test_settings_reach_the_callbacks_as_they_are(tmp_path: Path) -> None:
    selection = Selection.of(*FULL)
    noise, defence, monitor, _ = selected_callbacks(selection, tmp_path, bank=[0], query=[0])
    made: list[Any] = [noise, defence, monitor]
    chosen = [selection.poison, selection.defence, selection.monitor]
    for callback, settings in zip(made, chosen, strict=True):
        assert callback.config is settings


@pytest.mark.parametrize(
    ("poison", "kind"),
    [
        ("cp", CraftPoison),
        ("cp_class", CraftPoison),
        ("error_min", CraftErrorMin),
        ("tap", CraftTap),
        ("aue", CraftAue),
        ("aap", CraftAap),
        ("tue", CraftTue),
        ("pil", CraftPil),
        ("sep", CraftSep),
    ],
)
def test_a_craft_goes_to_the_runs_folder_unless_it_has_one(
    poison: str, kind: type[CraftPoison], tmp_path: Path
) -> None:
    for folder, given in ((tmp_path / "run", {}), (tmp_path / "own", {"dir": f"{tmp_path}/own"})):
        selection = Selection.of({"name": poison, "eps": 0.1, **given}, None)
        (craft,) = selected_callbacks(selection, tmp_path / "run", "mirror")
        assert type(craft) is kind
        assert craft.path.parent == folder
        assert craft.config.eps == 0.1


def test_a_clean_run_has_nothing_but_images_of_one_form() -> None:
    assert names(selected_callbacks(Selection.of(None, None), None)) == ["CanonicalImages"]
    with pytest.raises(UserError, match="augment must be one of mirror, host; got 'gpu'"):
        selected_callbacks(Selection.of(None, None), None, "gpu")


def test_keywords_and_an_object_say_the_same() -> None:
    assert CraftPoison(rounds=3).config == CraftPoison(CraftConfig(rounds=3)).config
    assert CraftTap(pgd_steps=3).config == CraftTap(TapConfig(pgd_steps=3)).config
    assert KNNMonitor(k=3).config == KNNMonitor(config=MonitorConfig(k=3)).config
    assert Defence("noise", std=0.1).config == Defence("noise", NoiseConfig(0.1)).config


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: CraftPoison(CraftConfig(), rounds=3), "poison.rounds is given beside a CraftCon"),
        (lambda: CraftPoison(RandomConfig()), "expected a CraftConfig, got RandomConfig"),
        (lambda: Defence("noise", CutoutConfig()), "expected a NoiseConfig, got CutoutConfig"),
        (lambda: KNNMonitor(config=MonitorConfig(), k=3), "monitor.k is given beside a Monitor"),
    ],
)
def test_settings_given_twice_or_of_another_kind_are_refused(make: Any, message: str) -> None:
    with pytest.raises(UserError, match=message):
        make()
