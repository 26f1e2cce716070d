"""Settings are checked where they are made, and mistakes are told in the user's words."""

import pytest

from cp_plugin.config.baselines import RandomConfig
from cp_plugin.config.selection import Selection
from cp_plugin.config.settings import (
    CraftConfig,
    InjectConfig,
    MonitorConfig,
    UserError,
    build,
    eps_levels,
    number,
)


@pytest.mark.parametrize(
    ("text", "value"), [("8/255", 8 / 255), ("0.03", 0.03), ("1e-2", 0.01), (" 4 / 255", 4 / 255)]
)
def test_numbers_as_text(text, value):
    assert number(text) == pytest.approx(value)
    assert build(CraftConfig, {"eps": text}).eps == pytest.approx(value)


def test_defaults_are_the_papers_sample_wise_settings():
    config = CraftConfig()
    assert (config.rounds, config.pgd_steps, config.step_size) == (200, 5, 0.1)
    assert config.eps == 8 / 255
    assert config.model_steps == config.noise_steps == "epoch"


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"epss": 0.1}, r"poison\.epss is not a setting; did you mean poison\.eps"),
        ({"frobnicate": 1}, r"poison\.frobnicate is not a setting; known keys: eps"),
        ({"eps": 8}, r"poison\.eps must lie in \[1/255, 1\].*got 8"),
        ({"eps": 0}, r"poison\.eps must lie in"),
        ({"eps": "eight"}, r"poison\.eps must be a number, got 'eight'"),
        ({"eps": "8/0"}, r"poison\.eps must be a number"),
        ({"granularity": "pixel"}, r"poison\.granularity must be one of sample, class"),
        ({"dtype": "float64"}, r"poison\.dtype must be one of float32, float16, int8"),
        ({"rounds": 0}, r"poison\.rounds must be an integer of at least 1"),
        ({"rounds": 2.5}, r"poison\.rounds must be an integer, got 2\.5"),
        ({"model_steps": -1}, r"poison\.model_steps must be an integer of at least 1 or `epoch`"),
        ({"step_size": 0}, r"poison\.step_size is in units of eps"),
        ({"fraction": 1.2}, r"poison\.fraction must be in \(0, 1\], got 1\.2"),
        ({"image_size": 4}, r"poison\.image_size must be between 8 and 512"),
        ({"dual_branch": "maybe"}, r"poison\.dual_branch must be true or false"),
        ({"rounds": True}, r"poison\.rounds must be an integer, got True"),
    ],
)
def test_mistakes_in_craft_settings(values, message):
    with pytest.raises(UserError, match=message):
        build(CraftConfig, values)


def test_inject_needs_a_path():
    with pytest.raises(UserError, match=r"poison\.path is missing; add poison\.path="):
        build(InjectConfig, {"path": "???"})


def test_monitor_settings_have_their_own_prefix():
    with pytest.raises(UserError, match=r"monitor\.every_n_epochs must be an integer of at least"):
        build(MonitorConfig, {"every_n_epochs": 0}, "monitor")


@pytest.mark.parametrize(("eps", "levels"), [(8 / 255, 8), (0.03, 7), (1 / 255, 1), (1.0, 255)])
def test_budget_in_levels(eps, levels):
    assert eps_levels(eps) == levels


def test_selection_reads_both_groups():
    selection = Selection.of({"name": "random", "eps": "4/255"}, {"name": "knn", "k": 5})
    assert selection.poison == RandomConfig(eps=4 / 255)
    assert selection.monitor == MonitorConfig(k=5)
    assert not selection.crafts


def test_no_groups_select_nothing():
    assert Selection.of(None, None) == Selection("none", None, None)


@pytest.mark.parametrize(
    ("poison", "message"),
    [
        ({"name": "cp_clas"}, "poison.name=cp_clas is unknown; did you mean cp_class"),
        ({"name": "none", "eps": 0.1}, "poison.eps is not a setting of poison=none"),
    ],
)
def test_unknown_selections(poison, message):
    with pytest.raises(UserError, match=message):
        Selection.of(poison, None)


def test_a_tag_depends_on_settings_and_on_the_poison_file(tmp_path):
    file = tmp_path / "poison.safetensors"
    file.write_bytes(b"one")
    selection = Selection.of({"name": "inject", "path": str(file)}, None)
    first = selection.tag({"lr": 1})
    assert first.startswith("inject-")
    assert selection.tag({"lr": 1}) == first
    assert selection.tag({"lr": 2}) != first
    file.write_bytes(b"two")
    assert selection.tag({"lr": 1}) != first
