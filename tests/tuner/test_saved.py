"""Adapters in PEFT's folders: what is refused by key leaves the model as it was, and no name clashes with a key."""

from __future__ import annotations

import re
from collections.abc import Callable
from itertools import cycle
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from nara_diffusion import noise_level
from tests.helpers.adapted import TwoLayers, adapted, disturb, nara_config

LEVELS = torch.tensor([0.05, 0.5, 0.93])
TARGETS = ["first", "second"]
WEIGHTS = "adapter_model.safetensors"
CORE = "base_model.model.nara_core.shared."
A_KEY = "base_model.model.first.lora_A.weight"

FREQUENCIES = CORE + "embeddings.noise_level.frequencies"

BROKEN: dict[str, Callable[[dict[str, Tensor]], Any]] = {
    "no core": lambda tensors: [tensors.pop(key) for key in list(tensors) if key.startswith(CORE)],
    "a missing A": lambda tensors: tensors.pop(A_KEY),
}


def base_model() -> TwoLayers:
    torch.manual_seed(7)
    return TwoLayers()


def reseeded_base() -> TwoLayers:
    """The same base model, after which the generator is somewhere else."""
    base = base_model()
    torch.manual_seed(12345)
    return base


def output(model: nn.Module, x: Tensor) -> Tensor:
    with noise_level(model, LEVELS), torch.no_grad():
        return model(x)


def rewrite(path: Path, change: Callable[[dict[str, Tensor]], Any]) -> None:
    tensors = load_file(path / WEIGHTS)
    change(tensors)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path / WEIGHTS)


BESIDE: dict[str, dict[str, Any]] = {
    "alone": {},
    "DoRA": {"use_dora": True},
    "a trained module": {"modules_to_save": ["second"], "target_modules": ["first"]},
    "trained biases": {"bias": "all"},
    "a start that changes the base": {"init_lora_weights": "pissa"},
}


def _frozen(model: nn.Module) -> dict[str, Any]:
    """All that a refused file could leave behind: modules, tensors, who is trainable, hooks, attributes."""
    return {
        "modules": {name: id(module) for name, module in model.named_modules()},
        "tensors": {name: tensor.clone() for name, tensor in model.state_dict().items()},
        "trainable": {name: parameter.requires_grad for name, parameter in model.named_parameters()},
        "hooks": {name: (len(m._forward_hooks), len(m._forward_pre_hooks)) for name, m in model.named_modules()},
        "attributes": set(vars(model)),
    }


def _assert_same(one: dict[str, Any], other: dict[str, Any], tolerance: float = 0.0) -> None:
    tensors, others = one.pop("tensors"), other.pop("tensors")
    assert one == other
    assert tensors.keys() == others.keys()
    for name, tensor in tensors.items():
        torch.testing.assert_close(others[name], tensor, rtol=tolerance, atol=tolerance, msg=name)


@pytest.mark.parametrize(
    ("beside", "broken"), list(zip(BESIDE, cycle(["no core", "cut off", "no file", "a missing A"]), strict=False))
)
def test_a_base_model_is_as_it_was_after_a_refused_file_and_takes_a_good_one(tmp_path, broken, beside):
    options = BESIDE[beside]
    model = adapted(base_model(), **{"target_modules": TARGETS, **options})
    model.save_pretrained(tmp_path)
    good = (tmp_path / WEIGHTS).read_bytes()
    if broken == "cut off":
        (tmp_path / WEIGHTS).write_bytes(good[:-9])
    elif broken == "no file":
        (tmp_path / WEIGHTS).rename(tmp_path / "elsewhere")
    else:
        rewrite(tmp_path, BROKEN[broken])
    base, x = reseeded_base(), torch.randn(3, 7)
    base.requires_grad_(False)
    base.second.bias.requires_grad_(True)
    before = _frozen(base)
    with pytest.raises((ValueError, OSError), match=re.escape(str(tmp_path))):
        PeftModel.from_pretrained(base, tmp_path)
    # PiSSA's rest of a weight is rounded, and so is the sum by which it comes back
    _assert_same(before, _frozen(base), tolerance=1e-6 if "init_lora_weights" in options else 0.0)
    with torch.no_grad():
        torch.testing.assert_close(base(x), base_model()(x))  # of no fresh core
    (tmp_path / WEIGHTS).write_bytes(good)
    torch.testing.assert_close(output(PeftModel.from_pretrained(base, tmp_path), x), output(model, x))


@pytest.mark.parametrize(
    ("beside", "core_type"),
    [("alone", "hypernetwork"), ("DoRA", "identity"), ("a trained module", "hypernetwork")],
)
def test_a_model_with_adapters_is_as_it_was_after_a_refused_file(tmp_path, beside, core_type):
    adapted(base_model(), **{"target_modules": TARGETS, **BESIDE[beside]}).save_pretrained(tmp_path)
    rewrite(tmp_path, lambda tensors: tensors.pop(FREQUENCIES))
    model = adapted(base_model(), target_modules=["first"], core_type=core_type)
    before = _frozen(model)
    with pytest.raises(ValueError, match=rf"{re.escape(str(tmp_path))}.* lacks '.*frequencies"):
        model.load_adapter(str(tmp_path), "other")
    _assert_same(before, _frozen(model))
    assert list(model.peft_config) == ["default"]
    assert model.active_adapters == ["default"]


# ---------------------------------------------------------------- numbers of another kind


@pytest.mark.parametrize(
    ("core_type", "dtype"),
    [("hypernetwork", torch.bfloat16), ("constant", torch.float16), ("knots", torch.int8)],
)
def test_a_state_dict_with_a_converted_core_is_refused_before_a_file_is_written(core_type, dtype, tmp_path):
    model = adapted(base_model(), target_modules=TARGETS, core_type=core_type)
    converted = {name: tensor.to(dtype) for name, tensor in model.state_dict().items()}
    with pytest.raises(ValueError, match=rf"is {dtype} in the state_dict to be saved, .* leave state_dict out"):
        model.save_pretrained(tmp_path / "adapter", state_dict=converted)
    assert not list(tmp_path.rglob("*.safetensors"))
    kept = {name: model.state_dict()[name] if "nara_core" in name else t.bfloat16() for name, t in converted.items()}
    model.save_pretrained(tmp_path / "adapter", state_dict=kept)
    loaded = PeftModel.from_pretrained(reseeded_base(), tmp_path / "adapter").state_dict()
    for name in (name for name in loaded if "nara_core" in name):
        assert torch.equal(loaded[name], model.state_dict()[name])


# ---------------------------------------------------------------- several adapters, by their names


@pytest.mark.parametrize("name", ["nara_core", "shared", "weight", "first", "lora_A"])
def test_an_adapter_named_like_a_part_of_a_key_is_refused_beside_another_and_saved_alone(tmp_path, name):
    for alone, added in ((name, "default"), ("default", name)):
        model = get_peft_model(base_model(), nara_config(target_modules=TARGETS), adapter_name=alone)
        disturb(model)
        before = model.state_dict().keys()
        with pytest.raises(ValueError, match=f"adapter '{name}' is named like a part of"):
            model.add_adapter(added, nara_config(target_modules=["first"]))
        assert model.state_dict().keys() == before
        assert set(model.peft_config) == {alone}
        model.save_pretrained(tmp_path)
        folder, x = tmp_path / ("" if alone == "default" else name), torch.randn(3, 7)
        assert len(load_file(folder / WEIGHTS)) == 2 * 2 + 7
        for adapter_name in (name, "default"):
            other = PeftModel.from_pretrained(reseeded_base(), folder, adapter_name=adapter_name)
            assert torch.equal(output(other, x), output(model, x))


def test_a_name_that_begins_like_another_is_not_confused_with_it(tmp_path):
    model = get_peft_model(base_model(), nara_config(target_modules=TARGETS), adapter_name="x")
    model.add_adapter("xy", nara_config(target_modules=TARGETS))
    model.add_adapter("y_x", nara_config(target_modules=TARGETS, core_type="constant"))
    disturb(model)
    model.save_pretrained(tmp_path)
    x = torch.randn(3, 7)
    for name, count in (("x", 11), ("xy", 11), ("y_x", 5)):
        assert len(load_file(tmp_path / name / WEIGHTS)) == count
        other = PeftModel.from_pretrained(reseeded_base(), tmp_path / name)
        model.set_adapter(name)
        assert torch.equal(output(other, x), output(model, x))
    other.load_adapter(tmp_path / "x", adapter_name="renamed")
    other.base_model.set_adapter(["renamed", "default"])
    model.base_model.set_adapter(["x", "y_x"])
    assert torch.equal(output(other, x), output(model, x))
