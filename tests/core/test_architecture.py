"""The house rules, read from the imports: who may import whom, and what loads no framework."""

from __future__ import annotations

import ast
import graphlib
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import frostline

SOURCE = Path(frostline.__file__).parent
FRAMEWORKS = {"torch", "torchvision", "timm", "transformers", "datasets", "keras", "tensorflow",
              "jax", "lightning", "accelerate", "sklearn", "PIL"}  # fmt: skip
# What a room may use besides: probes and scores of features need a library that fits them.
ALLOWED = {"study": {"sklearn"}}
EDGE = ("backends", "frontier", "integrations", "tasks")
# Rooms from the top of the house down; a room may import from its own floor and below.
FLOORS = {"cli": 5, "live": 4, "report": 4, "study": 4, "tasks": 3, "integrations": 3,
          "frontier": 2, "backends": 2, "testing": 1, "policies": 1}  # fmt: skip


def modules() -> Iterator[tuple[str, ast.Module]]:
    for path in sorted(SOURCE.rglob("*.py")):
        relative = path.relative_to(SOURCE.parent).with_suffix("")
        name = ".".join(relative.parts).removesuffix(".__init__")
        yield name, ast.parse(path.read_text(encoding="utf-8"))


def imports(tree: ast.Module, *, deferred: bool) -> Iterator[str]:
    """Imported module names; `deferred` includes imports inside functions."""
    for node in ast.walk(tree) if deferred else top_level(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            assert not node.level, "imports are absolute"
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def top_level(tree: ast.Module) -> Iterator[ast.stmt]:
    """Statements that run at import: all but function bodies and TYPE_CHECKING blocks."""
    waiting: list[ast.stmt] = list(tree.body)
    while waiting:
        node = waiting.pop()
        yield node
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            continue
        if isinstance(node, ast.If | ast.Try | ast.With | ast.ClassDef):
            waiting += [n for n in ast.iter_child_nodes(node) if isinstance(n, ast.stmt)]


MODULES = dict(modules())


def room(name: str) -> str:
    parts = name.split(".")
    return parts[1] if len(parts) > 1 else ""


CORE = [name for name in MODULES if room(name) not in FLOORS or room(name) == "policies"]
# What the core may use besides: the parser of phase files, which is no framework.
BESIDES = {"frostline.phase_file": {"yaml"}}
INNER = [name for name in MODULES if room(name) not in EDGE]


@pytest.mark.parametrize("name", CORE)
def test_the_core_imports_only_the_standard_library(name: str) -> None:
    outside = {i.partition(".")[0] for i in imports(MODULES[name], deferred=True)}
    assert outside <= set(sys.stdlib_module_names) | {"frostline"} | BESIDES.get(name, set())


@pytest.mark.parametrize("name", INNER)
def test_frameworks_live_at_the_edge(name: str) -> None:
    found = {i.partition(".")[0] for i in imports(MODULES[name], deferred=True)}
    assert not found & (FRAMEWORKS - ALLOWED.get(room(name), set()))


# The package itself gathers the public names, lazily where a framework is needed.
@pytest.mark.parametrize("name", [name for name in MODULES if name != "frostline"])
def test_no_room_imports_from_a_floor_above(name: str) -> None:
    floor = FLOORS.get(room(name), 0)
    above = {
        i
        for i in imports(MODULES[name], deferred=True)
        if i.startswith("frostline.") and FLOORS.get(room(i), 0) > floor
    }
    assert not above


def test_there_is_no_import_cycle() -> None:
    graph = {
        name: {i for i in imports(tree, deferred=False) if i in MODULES and i != name}
        for name, tree in MODULES.items()
        if name != "frostline"
    }
    for needed in graph.values():
        needed.discard("frostline")
    tuple(graphlib.TopologicalSorter(graph).static_order())  # raises on a cycle


def test_no_dangerous_reader_is_used() -> None:
    banned = {"pickle", "dill", "joblib", "marshal", "shelve", "cloudpickle"}
    for name, tree in MODULES.items():
        assert not {i.partition(".")[0] for i in imports(tree, deferred=True)} & banned, name
        calls = [ast.unparse(n.func) for n in ast.walk(tree) if isinstance(n, ast.Call)]
        assert not {"torch.load", "yaml.load", "eval", "exec", "np.load"} & set(calls) - {
            "yaml.load" if "SafeLoader" in ast.unparse(tree) else ""
        }, name


@pytest.mark.parametrize("name", ["frostline", "frostline.cli.study"])  # which reads records alone
def test_importing_it_loads_no_framework(name: str) -> None:
    code = f"import sys, {name}; print(sorted(set(sys.modules) & {FRAMEWORKS!r}))"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60
    )
    assert done.stdout.strip() == "[]"


def test_public_names_are_sorted_and_reachable() -> None:
    assert frostline.__all__ == sorted(frostline.__all__)
    for name in frostline.__all__:
        assert getattr(frostline, name) is not None
    assert dir(frostline) == frostline.__all__
    with pytest.raises(AttributeError, match="no_such_name"):
        _ = frostline.no_such_name
