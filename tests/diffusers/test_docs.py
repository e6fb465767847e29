"""docs/diffusers.md and docs/denoisers.md say what the code does: their tests exist, their tables are the code's."""

from __future__ import annotations

import ast
import re
from pathlib import Path

from nara_diffusion.noise.denoiser_classes import DENOISERS
from nara_diffusion.noise.denoisers.denoiser import Denoiser
from nara_diffusion.noise.denoisers.undeclared_classes import STATIC, UNDECLARED
from tests.helpers.diffusers_sources import families

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs" / "diffusers.md").read_text(encoding="utf-8")
CLASSES = (ROOT / "docs" / "denoisers.md").read_text(encoding="utf-8")
HEADINGS = {
    "discrete": "λ = t / N: discrete schedules (convention `timestep`)",
    "ratio": "λ = t: the share of a discrete schedule's time (convention `timestep`)",
    "sigma_1000": "λ = t / N: flows, t = N σ (convention `flow`)",
    "sigma": "λ = t: flows, t = σ (convention `flow`)",
    "data": "λ = 1 − t: flows, t = 1 − σ (convention `flow`)",
    "data_1000": "λ = 1 − t / N: flows, t = N (1 − σ) (convention `flow`)",
    "edm": "λ = σ / (1 + σ): EDM, t = ¼ ln σ (convention `edm`)",
    "angle": "λ = σ / (1 + σ): EDM, t = 2/π atan σ (convention `edm`)",
}


def test_every_test_that_the_page_names_exists():
    named = re.findall(r"`(tests/[\w/]+\.py)(?:::(\w+))?`", PAGE + CLASSES)
    assert len(named) > 30
    for path, function in named:
        tree = ast.parse((ROOT / path).read_text(encoding="utf-8"))
        functions = {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}
        assert not function or function in functions, f"{path}::{function}"


def test_every_file_of_tests_is_named():
    files = {str(path.relative_to(ROOT)) for path in Path(__file__).parent.rglob("test_*.py")}
    assert files == {name for name in files if name in PAGE}


def _rows(text: str) -> dict[str, tuple[str, ...]]:
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines()]
    return {row[0].strip("`"): tuple(row[1:]) for row in cells if re.fullmatch(r"`\w+`", row[0]) and len(row) > 1}


def _pipelines(name: str) -> str:
    found = families(name)
    return ", ".join(found[:4]) + (f" and {len(found) - 4} more" if len(found) > 4 else "")


def _samples(denoiser: Denoiser) -> str:
    return "one λ a batch" if denoiser.one_level or denoiser.packed else "several" * denoiser.sample_major


def test_the_tables_of_classes_are_the_code_s():
    sections = {text.partition("\n")[0]: _rows(text.partition("\n## ")[0]) for text in CLASSES.split("### ")[1:]}
    expected: dict[str, dict[str, tuple[str, ...]]] = {heading: {} for heading in HEADINGS.values()}
    for name, known in DENOISERS.items():
        arguments = ", ".join(f"`{argument}`" for argument in (known.argument, *known.also))
        expected[HEADINGS[known.meaning]][name] = (arguments, _samples(known), _pipelines(name))
    assert sections == expected
    assert [list(rows) for rows in sections.values()] == [sorted(rows) for rows in sections.values()]


def test_the_numbers_of_classes_are_the_code_s():
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    count = len(DENOISERS)
    assert f"for the\n{count} classes of the installed version" in CLASSES
    assert f"for {count} denoiser classes" in readme
    assert f"… {count} classes" in readme


def test_the_other_lists_of_classes_are_the_code_s():
    _, _, rest = CLASSES.partition("\n## Static classes")
    static, _, undeclared = rest.partition("\n## Classes that are not declared")
    assert {name: reason for name, (reason,) in _rows(static).items()} == STATIC
    rows = [line.strip("|").split("|") for line in undeclared.splitlines() if line.startswith("| `")]
    found = {name: reason.strip() for names, reason in rows for name in re.findall(r"`(\w+)`", names)}
    assert found == UNDECLARED
