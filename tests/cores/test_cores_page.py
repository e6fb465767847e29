"""docs/cores.md says what the code does: every type, every field and its default; its programs run."""

from __future__ import annotations

import ast
import dataclasses
import re
import sys
import types
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model

from nara_diffusion import NaraConfig, core_matrix
from nara_diffusion.cores import custom as custom_cores
from nara_diffusion.harness import command
from nara_diffusion.training.adapters.method_arguments import _CORE_READERS
from nara_diffusion.training.adapters.methods import CORE_FIELDS
from tests.helpers.adapted import TwoLayers

PAGE = (Path(__file__).resolve().parents[2] / "docs" / "cores.md").read_text(encoding="utf-8")


def rows(header: str) -> list[list[str]]:
    """The cells of the table whose first header is `header`."""
    table = PAGE.split(f"| {header} |")[1].split("\n\n")[0].splitlines()[2:]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in table]


def test_every_type_has_a_row():
    named = [re.sub(r'[`"]', "", row[0]) for row in rows("`core_type`")]
    assert tuple(named[:-1]) == custom_cores.BUILT_IN


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
    monkeypatch.setattr(custom_cores, "_factories", {})
    module, use, evaluation, ablations = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
    assert module.startswith("# my_cores.py\n")
    my_cores = types.ModuleType("my_cores")
    exec(module, vars(my_cores))
    monkeypatch.setitem(sys.modules, "my_cores", my_cores)
    names: dict = {}
    exec(use, names)
    model = get_peft_model(TwoLayers(), names["config"])
    model.get_parameter("base_model.model.nara_core.cores.default.shared.core.P").data.normal_()
    core = core_matrix(model, torch.tensor([0.0, 0.7]))
    torch.testing.assert_close(core @ core.transpose(1, 2), torch.eye(8).expand(2, 8, 8), rtol=0, atol=1e-5)
    assert torch.equal(core[0], torch.eye(8))
    exec(ablations, {"model": model, "torch": torch})
    calls = []
    monkeypatch.setattr(command, "main", lambda: calls.append(set(custom_cores.registered_cores())))
    exec(evaluation, {})
    assert calls == [{"rotation"}]


def test_who_reads_a_field_is_what_the_train_scripts_go_by():
    told = {}
    for names, _, readers, *_ in rows("field of `NaraConfig`"):
        if readers.split(", ")[0] in custom_cores.BUILT_IN:
            told |= dict.fromkeys(re.findall(r"`(\w+)`", names), tuple(readers.split(", ")))
    fields = {name: types for name, types in _CORE_READERS.items() if name in CORE_FIELDS - {"core_sharing"}}
    assert fields.items() <= told.items()
    refused = {"core_init", "core_input", "noise_embedding", "rank_mask_min"}
    assert told.keys() - fields.keys() == refused  # by NaraConfig, so that nothing is left to be said
