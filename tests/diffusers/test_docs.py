"""docs/diffusers.md says what the code does: its tests exist, its table of classes is the code's."""

from __future__ import annotations

import ast
import re
from pathlib import Path

from nara_diffusion.noise.denoisers import _DENOISERS

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs" / "diffusers.md").read_text(encoding="utf-8")
FORMULAS = {
    "discrete": ("t / 1000", "timestep"),
    "sigma_1000": ("t / 1000", "flow"),
    "sigma": ("t", "flow"),
    "data_1000": ("1 − t / 1000", "flow"),
    "data": ("1 − t", "flow"),
}


def test_every_test_that_the_page_names_exists():
    named = re.findall(r"`(tests/[\w/]+\.py)(?:::(\w+))?`", PAGE)
    assert len(named) > 30
    for path, function in named:
        tree = ast.parse((ROOT / path).read_text(encoding="utf-8"))
        functions = {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}
        assert not function or function in functions, f"{path}::{function}"


def test_every_file_of_tests_is_named():
    files = {path.name for path in Path(__file__).parent.glob("test_*.py")}
    assert files == {name for name in files if name in PAGE}


def test_the_table_of_classes_is_the_code_s():
    rows = {}
    for line in PAGE.splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if re.fullmatch(r"`\w+`", cells[0]) and len(cells) == 5:
            rows[cells[0].strip("`")] = tuple(cells[1:])
    expected = {
        name: (f"`{known.argument}`", *FORMULAS[known.meaning], "yes" if known.sample_major else "")
        for name, known in _DENOISERS.items()
    }
    assert rows == expected
