"""Settings are checked where they are made, and mistakes are told in the user's words."""

import pytest
from omegaconf import OmegaConf

from cp_plugin.attack.loop import Schedule
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
from cp_plugin.util.paths import shipped


@pytest.mark.parametrize(
    ("text", "value"), [("8/255", 8 / 255), ("0.03", 0.03), ("1e-2", 0.01), (" 4 / 255", 4 / 255)]
)
def test_numbers_as_text(text, value):
    assert number(text) == pytest.approx(value)
    assert build(CraftConfig, {"eps": text}).eps == pytest.approx(value)


def shipped_group(name):
    node = OmegaConf.load(shipped("configs") / "poison" / f"{name}.yaml")
    return Selection.of(OmegaConf.to_container(node.poison), None).poison


def test_defaults_are_those_of_the_group_cp():
    assert shipped_group("cp") == CraftConfig()


def test_shipped_crafts_cost_what_the_papers_do():
    """CP-C and CP-S of CIFAR-10 in batches of 512, two views: 160 million image passes in all."""
    passes = 0
    for config in (shipped_group("cp_class"), shipped_group("cp")):
        steps = [
            50_000 // 512 if number == "epoch" else number
            for number in (config.model_steps, config.noise_steps)
        ]
        passes += Schedule(config.rounds, *steps, config.pgd_steps).image_passes(512, 2)
    assert passes == pytest.approx(160e6, rel=0.005)


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
