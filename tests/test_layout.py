"""Imports between the rooms of the package run one way, and no module imports itself by a detour."""

from __future__ import annotations

import ast
from collections import Counter
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "nara_diffusion"
FLOORS = (
    ("utils",),
    ("cores",),
    ("config", "layers", "noise"),
    ("tuner", "loaders"),
    ("export",),
    ("training",),
    ("dllm", "dreambooth", "check"),
    ("lm_eval",),
    ("cli",),
)
"""From below: a room imports from its own floor and those below it."""
FLOOR = {room: floor for floor, rooms in enumerate(FLOORS) for room in rooms}
ROOT = ("wraps", "__init__")
"""Modules of the package itself, which name what the rooms have."""


def imports() -> dict[str, set[str]]:
    """{module: modules of the package that it imports, wherever in the file}."""
    found = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        module = ".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts).removesuffix(".__init__")
        package = module if path.name == "__init__.py" else module.rpartition(".")[0]
        found[module] = set()
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                found[module] |= {alias.name for alias in node.names if alias.name.startswith("nara_diffusion")}
            if isinstance(node, ast.ImportFrom):
                base = node.module or ""
                if node.level:
                    parent = package.split(".")[: len(package.split(".")) - node.level + 1]
                    base = ".".join([*parent, *filter(None, [node.module])])
                if base.startswith("nara_diffusion"):
                    found[module] |= {base, *(f"{base}.{alias.name}" for alias in node.names)}
    return {module: {name for name in names if name in found and name != module} for module, names in found.items()}


def room_of(module: str) -> str:
    return [*module.split("."), "__init__"][1]


def test_every_room_has_a_floor_and_imports_nothing_from_above():
    assert {room_of(module) for module in imports()} - set(ROOT) <= set(FLOOR)
    upward = [
        f"{module} → {name}"
        for module, names in imports().items()
        for name in names
        if room_of(module) in FLOOR
        and room_of(name) in FLOOR
        and FLOOR[room_of(name)] > FLOOR[room_of(module)]
        and not module.endswith(".train")  # a program
    ]
    assert upward == []


def test_no_modules_import_each_other():
    """Importing from the package that a module lies in aside."""
    TopologicalSorter(
        {
            module: {name for name in names if room_of(name) not in ROOT and not module.startswith(f"{name}.")}
            for module, names in imports().items()
        }
    ).prepare()  # CycleError has the modules


@pytest.mark.parametrize("room", ["cores", "layers/functional.py"])
def test_mathematics_imports_torch_alone(room):
    files = [PACKAGE / room] if room.endswith(".py") else sorted((PACKAGE / room).glob("*.py"))
    for path in files:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) and not node.level else []
            assert not [name for name in names if name.split(".")[0] in ("peft", "diffusers", "transformers")], path


def test_no_file_name_comes_twice():
    names = Counter(path.name for path in PACKAGE.rglob("*.py"))
    assert {name for name, count in names.items() if count > 1} <= {"__init__.py", "train.py"}
