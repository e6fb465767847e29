"""Each private name of PEFT that the package uses is listed with its reason, and the installed PEFT has it."""

from __future__ import annotations

import ast
from pathlib import Path
from types import FunctionType

import pytest
import torch
from peft import LoraConfig, PeftConfig, get_peft_model
from peft.tuners.lora import LoraModel
from torch import nn

import nara_diffusion
from nara_diffusion import NaraModel
from nara_diffusion.tuner.peft_internals import OVERRIDDEN, READ, SET

PACKAGE = Path(nara_diffusion.__file__).parent
METHODS = [(LoraModel, name) for name in OVERRIDDEN] + [(kind, name) for kind in READ for name in READ[kind]]


@pytest.mark.parametrize(("kind", "name"), METHODS, ids=[name for _, name in METHODS])
def test_installed_peft_has_the_method(kind: type, name: str) -> None:
    assert callable(getattr(kind, name, None)), f"PEFT's {kind.__name__} lacks {name}: see tuner/peft_internals.py"


def test_layers_of_the_installed_peft_have_the_attributes() -> None:
    model = get_peft_model(nn.Sequential(nn.Conv2d(3, 5, 1)), LoraConfig(target_modules=["0"], r=2))
    layer = model.base_model.model[0]
    missing = [name for kind in SET if isinstance(layer, kind) for name in SET[kind] if not hasattr(layer, name)]
    assert missing == []
    assert model(torch.ones(1, 3, 2, 2)).shape == (1, 5, 2, 2)


def test_each_private_method_that_nara_model_overrides_is_listed() -> None:
    own = {name for name, value in vars(NaraModel).items() if isinstance(value, (FunctionType, classmethod))}
    assert {name for name in own if name.startswith("_") and not name.startswith("__")} == set(OVERRIDDEN)


def test_nothing_private_is_imported_from_peft() -> None:
    found = []
    for path in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "peft":
                found += [f"{path.name}: {alias.name}" for alias in node.names if alias.name.startswith("_")]
    assert found == []


def test_each_private_attribute_of_pefts_layers_is_listed() -> None:
    """Those that PEFT's LoRA layers have by the names that the package reads, wherever it reads them."""
    model = get_peft_model(nn.Sequential(nn.Conv2d(3, 5, 1), nn.Embedding(7, 5)), LoraConfig(target_modules=["0", "1"]))
    there = {name for layer in model.base_model.model for name in dir(layer)}
    there = (there | set(dir(PeftConfig))) - set(dir(nn.Module()))
    used = set()
    for path in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            is_private = isinstance(node, ast.Attribute) and node.attr.startswith("_")
            if is_private and not node.attr.startswith("__"):
                used.add(node.attr)
    listed = {name for names in (*READ.values(), *SET.values()) for name in names}
    assert used & there == listed
