"""Each private name of PEFT that the package uses is listed here with its reason, and the installed PEFT has it.

PEFT may change these names at any time, so pyproject.toml allows only a narrow range of PEFT versions.
"""

from __future__ import annotations

import ast
from pathlib import Path
from types import FunctionType

import pytest
import torch
from peft import LoraConfig, PeftConfig, get_peft_model
from peft.tuners.lora import Conv2d, Embedding, LoraLayer, LoraModel
from torch import nn

import nara_diffusion
from nara_diffusion import NaraModel

OVERRIDDEN = {
    "_create_and_replace": "checks each target, and gives each new layer its LoRA variant",
    "_unload_and_optionally_merge": "removes the holder of the cores when PEFT unloads",
    "_enable_peft_forward_hooks": "refuses an adapter for each sample",
    "_get_adapter_state_dict": "adds the cores to what PEFT saves",
    "_remove_adapter_name_from_key": "names the cores in files",
    "_remap_adapter_state_dict_for_load": "finds the cores in a file, and checks all its tensors",
}
"""Methods of `LoraModel` that `NaraModel` overrides. PEFT has no public hooks for them."""

READ: dict[type, dict[str, str]] = {
    LoraLayer: {
        "_cache_store": "keeps what a merge added to the base weight, until it is unmerged",
        "_cache_pop": "takes that back",
        "_unmerged_base_weight": "gives DoRA's norm the base weight without other merged adapters",
    },
    PeftConfig: {"_get_peft_type": "tells whether an adapter on the Hub is a NaRA"},
    Embedding: {
        "_embed": "looks up A with the padding and sparsity of the base layer",
        "_get_embed_scale": "is the scale of the embeddings in some models",
    },
}
"""PEFT's class → its methods that the layers and loaders call."""

SET: dict[type, dict[str, str]] = {
    LoraLayer: {
        "_disable_adapters": "switches layers on or off without a change of what is trainable",
        "_active_adapter": "activates adapters without a change of what is trainable",
    },
    Conv2d: {"_kernel_dim": "tells a sample without batch axis from a batch"},
}
"""PEFT's class → attributes of its layers that are read or set."""

PACKAGE = Path(nara_diffusion.__file__).parent
METHODS = [(LoraModel, name) for name in OVERRIDDEN] + [(kind, name) for kind in READ for name in READ[kind]]


@pytest.mark.parametrize(("kind", "name"), METHODS, ids=[name for _, name in METHODS])
def test_installed_peft_has_the_method(kind: type, name: str) -> None:
    assert callable(getattr(kind, name, None)), f"PEFT's {kind.__name__} lacks {name}"


def test_layers_of_the_installed_peft_have_the_attributes() -> None:
    model = get_peft_model(nn.Sequential(nn.Conv2d(3, 5, 1)), LoraConfig(target_modules=["0"], r=2))
    layer = model.base_model.model[0]
    missing = [name for kind in SET if isinstance(layer, kind) for name in SET[kind] if not hasattr(layer, name)]
    assert missing == []
    assert model(torch.ones(1, 3, 2, 2)).shape == (1, 5, 2, 2)


def test_every_overridden_private_method_is_listed() -> None:
    methods = {name for name, value in vars(NaraModel).items() if isinstance(value, (FunctionType, classmethod))}
    assert {name for name in methods if name.startswith("_") and not name.startswith("__")} == set(OVERRIDDEN)


def test_nothing_private_is_imported_from_peft() -> None:
    private = []
    for path in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "peft":
                private += [f"{path.name}: {alias.name}" for alias in node.names if alias.name.startswith("_")]
    assert private == []


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
