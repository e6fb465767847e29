"""docs/cores.md says what the code does: every type, every field and its default; its programs run."""

from __future__ import annotations

import ast
import dataclasses
import re
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model

from nara_diffusion import NaraConfig, core_matrix, own_cores
from tests.adapted import TwoLayers

PAGE = (Path(__file__).resolve().parents[1] / "docs" / "cores.md").read_text(encoding="utf-8")


def rows(header: str) -> list[list[str]]:
    """The cells of the table whose first header is `header`."""
    table = PAGE.split(f"| {header} |")[1].split("\n\n")[0].splitlines()[2:]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in table]


def test_every_type_has_a_row():
    named = [re.sub(r'[`"]', "", row[0]) for row in rows("`core_type`")]
    assert tuple(named[:-1]) == own_cores.BUILT_IN


def test_every_field_has_a_row_with_its_default():
    defaults = {field.name: field.default for field in dataclasses.fields(NaraConfig)}
    own = defaults.keys() - {field.name for field in dataclasses.fields(LoraConfig)} - {"core_type"}
    told = {}
    for names, default, *_ in rows("field of `NaraConfig`"):
        values = [default] if ", " not in names else default.split(", ")
        told |= dict(zip(re.findall(r"`(\w+)`", names), values, strict=True))
    assert told.keys() == own
    assert told.pop("rank_mask_min") == "half of r"
    for name, text in told.items():
        assert ast.literal_eval(text.strip("`")) == defaults[name], name


def test_the_programs_run(monkeypatch):
    monkeypatch.setattr(own_cores, "_factories", {})
    first, second = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
    names: dict = {}
    exec(first, names)
    model = get_peft_model(TwoLayers(), names["config"])
    model.get_parameter("base_model.model.nara_core.cores.default.global.core.P").data.normal_()
    core = core_matrix(model, torch.tensor([0.0, 0.7]))
    torch.testing.assert_close(core @ core.transpose(1, 2), torch.eye(8).expand(2, 8, 8), rtol=0, atol=1e-5)
    assert torch.equal(core[0], torch.eye(8))
    exec(second, {"model": model, "torch": torch})
