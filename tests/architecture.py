"""What the package is made of: rooms, the imports between them, circles, private interfaces, lines.

`python -m tests.architecture [CHECKOUT ...]` prints one column a checkout; `test_architecture.py`
holds the same figures against what the README promises.
"""

from __future__ import annotations

import argparse
import ast
import functools
from collections.abc import Iterable, Iterator
from pathlib import Path

import networkx

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = "cp_plugin"
LIBRARIES = ("torch", "torchvision", "lightning", "pytorch_lightning", "hydra", "timm", "solo")
"""Packages whose private interfaces are looked for."""

Graph = networkx.DiGraph


def modules(root: Path = ROOT, package: str = PACKAGE) -> dict[str, Path]:
    """Return a package's modules by dotted name; a folder's `__init__` has the folder's."""
    found = {}
    for path in sorted((root / package).rglob("*.py")):
        parts = path.relative_to(root).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


@functools.cache
def parsed(path: Path) -> ast.Module:
    """Return the syntax tree of a module."""
    return ast.parse(path.read_text(encoding="utf8"))


def module_graph(root: Path = ROOT, package: str = PACKAGE) -> Graph:
    """Return which module imports which, an edge an import statement that runs.

    Imports under `if TYPE_CHECKING:` count too: what a reader has to know counts.
    """
    known = modules(root, package)
    graph = Graph()
    graph.add_nodes_from(known)
    for name, path in known.items():
        tree = parsed(path)
        graph.add_edges_from((name, other) for other in _imported(tree, known) if other != name)
    return graph


def room_of(module: str) -> str:
    """Return the entry at the root of the package that a module lies in or below."""
    return [*module.split("."), "__init__"][1]


def room_graph(root: Path = ROOT) -> Graph:
    """Return which room imports which; the package's own `__init__` is no room."""
    graph = Graph()
    for name in modules(root):
        graph.add_node(room_of(name))
    for source, target in module_graph(root).edges:
        if room_of(source) != room_of(target):
            graph.add_edge(room_of(source), room_of(target))
    graph.remove_nodes_from(["__init__"])
    return graph


def circles(graph: Graph) -> list[list[str]]:
    """Return groups of nodes that import each other, each sorted."""
    parts = networkx.strongly_connected_components(graph)
    return sorted(sorted(part) for part in parts if len(part) > 1)


def layers(graph: Graph) -> list[list[str]]:
    """Return rooms from the lowest layer up; rooms of one circle count as one."""
    condensed = networkx.condensation(graph)
    generations = networkx.topological_generations(condensed.reverse())
    return [
        sorted(room for node in generation for room in condensed.nodes[node]["members"])
        for generation in generations
    ]


def private_uses(root: Path = ROOT) -> list[tuple[str, int, str]]:
    """Return (module, line, name) of each private name of another package that is used.

    Names are told by their form, since types are not known: an import from a private module or of
    a private name, `torch._C` and the like, and an attribute with one leading underscore of
    anything but `self`, `cls`, and what the package defines itself.
    """
    known = modules(root)
    trees = {name: parsed(path) for name, path in known.items()}
    own = {name for tree in trees.values() for name in _defined(tree)}
    found = []
    for name, tree in trees.items():
        for node in ast.walk(tree):
            for line, private in _private_names(node):
                if private not in own:
                    found.append((name, line, private))
    return found


def assigned_in_libraries(root: Path = ROOT) -> list[tuple[str, int, str]]:
    """Return (module, line, target) of each assignment to an attribute of a library's own name.

    `Tensor.backward = …` changes torch for the whole process, whoever uses it.
    """
    found = []
    for name, path in modules(root).items():
        tree = parsed(path)
        theirs = {
            (alias.asname or alias.name).partition(".")[0]
            for node in ast.walk(tree)
            if isinstance(node, ast.Import | ast.ImportFrom)
            for alias in node.names
            if (getattr(node, "module", None) or alias.name).partition(".")[0] in LIBRARIES
        }
        for node in ast.walk(tree):
            if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store | ast.Del):
                target = ast.unparse(node)
                if target.partition(".")[0] in theirs:
                    found.append((name, node.lineno, target))
    return found


def lines(paths: Iterable[Path]) -> int:
    """Return the lines of files."""
    return sum(len(path.read_text(encoding="utf8").splitlines()) for path in paths)


def figures(root: Path = ROOT) -> dict[str, str]:
    """Return the figures of a checkout, by name."""
    rooms, inside = room_graph(root), module_graph(root)
    private = private_uses(root)
    entries = [
        path for path in (root / PACKAGE).iterdir() if path.suffix == ".py" or _is_room(path)
    ]
    return {
        "entries at the root of the package": str(len(entries)),
        "rooms": str(len(rooms)),
        "imports between rooms": str(rooms.number_of_edges()),
        "layers": str(len(layers(rooms))),
        "circles of rooms": str(len(circles(rooms))),
        "circles of modules": str(len(circles(inside))),
        "private interfaces of others": str(len(private)),
        "modules that use them": str(len({module for module, _, _ in private})),
        "lines of README.md": str(lines([root / "README.md"])),
        "lines of the package": str(lines((root / PACKAGE).rglob("*.py"))),
        "lines of the tests": str(lines((root / "tests").rglob("*.py"))),
    }


def _is_room(path: Path) -> bool:
    return path.is_dir() and any(path.rglob("*.py"))


def _imported(tree: ast.AST, known: dict[str, Path]) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name in known)
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            for alias in node.names:
                full = f"{node.module}.{alias.name}"
                if full in known:
                    yield full
                elif node.module in known and node.module != PACKAGE:
                    yield node.module


def _defined(tree: ast.AST) -> Iterator[str]:
    """Yield names that a module defines or sets: functions, classes, variables, attributes."""
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            yield node.name
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            yield node.id
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
            base = node.value
            if isinstance(base, ast.Name) and base.id in ("self", "cls"):
                yield node.attr


def _private_names(node: ast.AST) -> Iterator[tuple[int, str]]:
    if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] in LIBRARIES:
        path = [*(node.module or "").split("."), *(alias.name for alias in node.names)]
        yield from ((node.lineno, part) for part in path if _is_private(part))
    elif isinstance(node, ast.Attribute) and _is_private(node.attr):
        base = node.value
        if not (isinstance(base, ast.Name) and base.id in ("self", "cls", "super")):
            yield node.lineno, node.attr
    elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
        named = node.func.id in ("getattr", "hasattr", "setattr", "delattr")
        if named and len(node.args) > 1 and isinstance(node.args[1], ast.Constant):
            value = node.args[1].value
            if isinstance(value, str) and _is_private(value):
                yield node.lineno, value


def _is_private(name: str) -> bool:
    public = ("_", "_replace", "_fields", "_asdict", "_exit")  # of named tuples, and of `os`
    return name.startswith("_") and not name.startswith("__") and name not in public


def main() -> None:
    """Print a table of figures, a column a checkout."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("checkouts", nargs="*", type=Path, default=[ROOT])
    parser.add_argument("--private", action="store_true", help="list every private interface")
    arguments = parser.parse_args()
    columns = [figures(root) for root in arguments.checkouts]
    print("| figure |", " | ".join(root.resolve().name for root in arguments.checkouts), "|")
    print("|---" * (len(columns) + 1) + "|")
    for name in columns[0]:
        print(f"| {name} | {' | '.join(column[name] for column in columns)} |")
    if arguments.private:
        for module, line, name in private_uses(arguments.checkouts[-1]):
            print(f"{module}:{line}: {name}")


if __name__ == "__main__":
    main()
