"""The notebook examples/nara_on_cpu.ipynb: its cells run from top to bottom, and what is stored in it is theirs."""

import json
import re
from pathlib import Path
from typing import Any

import matplotlib
import pytest

NOTEBOOK = Path(__file__).parents[1] / "examples" / "nara_on_cpu.ipynb"


@pytest.fixture(scope="module")
def cells() -> list[dict[str, Any]]:
    book = json.loads(NOTEBOOK.read_text(encoding="utf-8"))
    assert (book["nbformat"], book["nbformat_minor"]) == (4, 5)
    return book["cells"]


def test_the_notebook_is_small_and_was_run_from_top_to_bottom(cells: list[dict[str, Any]]) -> None:
    assert NOTEBOOK.stat().st_size <= 300_000
    code = [cell for cell in cells if cell["cell_type"] == "code"]
    assert [cell["execution_count"] for cell in code] == list(range(1, len(code) + 1))
    outputs = [output for cell in code for output in cell["outputs"]]
    assert {output["output_type"] for output in outputs} == {"stream", "display_data"}
    assert sum("image/png" in output.get("data", {}) for output in outputs) == 4
    assert len({cell["id"] for cell in cells}) == len(cells)


def test_the_cells_run_and_print_what_is_stored(
    cells: list[dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """With fewer steps of sampling, by which no printed number changes; rounding differs between machines."""
    matplotlib.use("agg")
    import matplotlib.pyplot as plt

    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    for number, cell in enumerate(cell for cell in cells if cell["cell_type"] == "code"):
        source = "".join(cell["source"]).replace('"num_inference_steps": 12', '"num_inference_steps": 1')
        exec(compile(source, f"code cell {number + 1}", "exec"), names)
        stored = [line for output in cell["outputs"] for line in output.get("text", [])]
        pictures = sum("data" in output for output in cell["outputs"])
        assert len(plt.get_fignums()) == pictures
        plt.close("all")
        printed = capsys.readouterr().out
        assert words_of(printed) == words_of("".join(stored))
        for ours, theirs in zip(numbers_of(printed), numbers_of("".join(stored)), strict=True):
            assert ours == pytest.approx(theirs, rel=0.05) or max(ours, theirs) < 1e-5
    assert (tmp_path / "toy_at_0.5.safetensors").exists()


NUMBER = re.compile(r"\d+(?:\.\d+)?(?:e[+-]?\d+)?")


def words_of(text: str) -> str:
    return NUMBER.sub("#", text)


def numbers_of(text: str) -> list[float]:
    return [float(number) for number in NUMBER.findall(text)]
