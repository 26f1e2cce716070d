"""Imports run one way, and the cheap modules stay cheap."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import cp_plugin

PACKAGE = Path(cp_plugin.__file__).parent
LAYERS = {
    "config": 0,
    "defence_config": 0,
    "baseline_config": 0,
    "paths": 0,
    "provenance": 0,
    "host": 1,
    "perturbation": 1,
    "poison": 1,
    "release": 1,
    "branches": 1,
    "gather": 1,
    "ranks": 1,
    "untouched": 1,
    "attributes": 1,
    "surrogates": 1,
    "selection": 1,
    "data": 2,
    "mirror": 2,
    "defences": 2,
    "components": 1,
    "bounds": 1,
    "neighbours": 1,
    "evaluate": 2,
    "banks": 3,
    "baselines": 3,
    "attack": 3,
    "asking": 3,
    "adapters": 3,
    "crafting": 3,
    "finetune": 4,
    "engine": 3,
    "callbacks": 4,
    "loop": 4,
    "activation": 5,
    "solo_activation": 5,
    "solo_checkpoints": 5,
    "solo_data": 5,
    "patching": 5,
    "doctor": 5,
    "hydra_plugin": 5,
    "hydra_app": 5,
    "labelled_methods": 5,
    "pretrain": 5,
    "checkpoints": 5,
    "transfer": 5,
    "pictures": 5,
    "demo": 5,
    "study": 5,
    "report": 5,
    "cli": 5,
    "search_path": 5,
    "__init__": 5,
}


def unit(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imported_units(path: Path) -> set[str]:
    units = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf8"))):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("cp_plugin"):
            parts = (node.module or "").split(".")
            units |= {parts[1]} if len(parts) > 1 else {alias.name for alias in node.names}
        elif isinstance(node, ast.Import):
            names = [alias.name.split(".") for alias in node.names]
            units |= {name[1] for name in names if name[0] == "cp_plugin" and len(name) > 1}
    return units


SOURCES = sorted(PACKAGE.rglob("*.py"))


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_a_module_imports_only_its_own_layer_and_lower_ones(path):
    own = unit(path)
    for other in imported_units(path) - {own}:
        assert LAYERS[other] <= LAYERS[own], f"{own} (layer {LAYERS[own]}) imports {other}"


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_modules_stay_small(path):
    assert len(path.read_text(encoding="utf8").splitlines()) <= 320


@pytest.mark.parametrize("module", ["cp_plugin", "hydra_plugins.cp_plugin", "cp_plugin.cli"])
def test_importing_loads_nothing_heavy(module):
    heavy = ("torch", "faiss", "timm", "lightning", "lightly", "matplotlib")
    program = f"import sys, {module}; print([m for m in {heavy!r} if m in sys.modules], end='')"
    found = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert (found.stdout, found.stderr) == ("[]", "")


def test_public_names_are_there():
    callbacks = {"CraftPoison", "Defence", "InjectPoison", "KNNMonitor"}
    loops = {"PoisonLoop", "defended", "poisoned"}
    assert set(cp_plugin.__all__) == callbacks | loops | {"Poison"}
    for name in cp_plugin.__all__:
        assert getattr(cp_plugin, name).__doc__
    with pytest.raises(AttributeError, match="no attribute 'Nothing'"):
        _ = cp_plugin.Nothing
