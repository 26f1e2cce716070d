"""What the package promises of its structure, and that cheap imports stay cheap."""

from __future__ import annotations

import ast
import re

import pytest

import cp_plugin
from tests import architecture

ROOMS = (
    *("util", "config", "data", "mirror", "hosts", "defences", "attack", "evaluation", "loop"),
    *("callbacks", "engine", "integrations", "apps"),
)
"""From the lowest to the highest: a room imports only rooms before it."""
PRIVATE_WORDS = re.compile(
    r"\b(passport|opened_loader|Opened|[Aa]sking|AskingAttack|AskingCrafting|Untouched|untouched"
    r"|settl(e|ed|ing)|DrawPoison|neighbours_of|check_release|release_of|feeds?|ViewPart"
    r"|(?<!Barlow )[Tt]wins?|SeenImages|num_chain|[Ii]mageStage|tones|warp)\b"
)
"""Words of our own for which the field has a term; Barlow Twins is a method's name."""
LONGEST_FUNCTION = 60
"""Lines, its docstring left out: what fits a screen."""


def test_a_room_imports_only_rooms_below_it() -> None:
    graph = architecture.room_graph()
    assert set(graph) == set(ROOMS)
    upward = [(a, b) for a, b in graph.edges if ROOMS.index(a) < ROOMS.index(b)]
    assert upward == []


def test_no_circles() -> None:
    assert architecture.circles(architecture.room_graph()) == []
    assert architecture.circles(architecture.module_graph()) == []


def test_the_root_of_the_package_is_small() -> None:
    package = architecture.ROOT / architecture.PACKAGE
    entries = [path for path in package.iterdir() if path.name != "__pycache__"]
    assert len(entries) <= 15
    for room in ROOMS:
        path = package / room
        text = path.with_suffix(".py") if room == "loop" else path / "__init__.py"
        assert ast.get_docstring(ast.parse(text.read_text(encoding="utf8")))


def test_no_test_imports_another_and_helpers_are_imported_one_way() -> None:
    graph = architecture.module_graph(package="tests")
    tests = {name for name in graph if name.rpartition(".")[2].startswith(("test_", "conftest"))}
    assert len(tests) > 40
    assert [edge for edge in graph.edges if edge[1] in tests] == []
    assert architecture.circles(graph) == []


def functions() -> list[tuple[str, int]]:
    """Return every function of the package and its lines without the docstring."""
    found = []
    for module, path in architecture.modules().items():
        for node in ast.walk(architecture.parsed(path)):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                body = node.body[1:] if ast.get_docstring(node) else node.body
                start = body[0].lineno if body else node.lineno
                found.append((f"{module}.{node.name}", (node.end_lineno or start) - start + 1))
    return found


def test_a_function_fits_a_screen() -> None:
    assert [name for name, lines in functions() if lines > LONGEST_FUNCTION] == []


def test_terms_are_those_of_the_field() -> None:
    found = [
        (name, match.group())
        for name, path in architecture.modules().items()
        for match in PRIVATE_WORDS.finditer(path.read_text(encoding="utf8"))
    ]
    assert found == []


def test_private_interfaces_are_in_one_module() -> None:
    uses = architecture.private_uses()
    assert {module for module, _, _ in uses} == {"cp_plugin.util.internals"}
    tests = (architecture.ROOT / "tests/unit/util/test_internals.py").read_text(encoding="utf8")
    names = {name for _, _, name in uses} - {"_C", "_internal"}
    assert sorted(name for name in names if name not in tests) == []


def test_nothing_of_a_library_is_replaced_for_the_whole_process() -> None:
    assert architecture.assigned_in_libraries() == []


def test_public_names_are_there() -> None:
    callbacks = {"CraftPoison", "Defence", "InjectPoison", "KNNMonitor"}
    loops = {"PoisonLoop", "defended", "poisoned"}
    assert set(cp_plugin.__all__) == callbacks | loops | {"Poison"}
    for name in cp_plugin.__all__:
        assert getattr(cp_plugin, name).__doc__
    with pytest.raises(AttributeError, match="no attribute 'Nothing'"):
        _ = cp_plugin.Nothing


@pytest.mark.parametrize(
    ("room", "names"),
    [
        ("callbacks", ("CraftErrorMin", "CraftPoison", "CraftTap", "Defence", "InjectPoison",
                       "KNNMonitor", "MirrorViews", "inject")),
        ("mirror", ("Mirror", "Operation", "Params", "Shape", "mirror", "register_twin")),
        ("defences", ("Completions", "Cutout", "GaussianNoise", "Mixing", "Pixels", "Private",
                      "Smoothing", "adversarial_views", "complete", "complete_images",
                      "completions_of", "defended", "soft_threshold", "with_group_norm")),
        ("hydra_plugin", ("Activation",)),
    ],
)  # fmt: skip
def test_names_of_version_0_1_still_import(room: str, names: tuple[str, ...]) -> None:
    from hydra.utils import get_object

    for name in names:
        assert get_object(f"cp_plugin.{room}.{name}")
