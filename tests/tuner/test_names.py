"""Several adapters in one folder, saved each alone, under any name that does not clash with a key."""

from __future__ import annotations

from itertools import cycle

import pytest
import torch
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file

from tests.helpers.adapted import disturb, nara_config
from tests.helpers.files.saved_adapters import TARGETS, WEIGHTS, base_model, output, reseeded_base

PARTS_OF_A_KEY = ["nara_core", "shared", "weight", "first", "lora_A"]


@pytest.mark.parametrize("name", ["nara_core", "weight"])
def test_an_adapter_named_like_a_part_of_a_key_is_saved_and_loaded_alone(tmp_path, name):
    model = get_peft_model(base_model(), nara_config(target_modules=TARGETS), adapter_name=name)
    disturb(model)
    model.save_pretrained(tmp_path)
    assert len(load_file(tmp_path / name / WEIGHTS)) == 2 * 2 + 7
    for adapter_name in (name, "default"):
        other = PeftModel.from_pretrained(reseeded_base(), tmp_path / name, adapter_name=adapter_name)
        x = torch.randn(3, 7)
        assert torch.equal(output(other, x), output(model, x))


@pytest.mark.parametrize(("name", "clashing_first"), list(zip(PARTS_OF_A_KEY, cycle([False, True]), strict=False)))
def test_beside_another_adapter_such_a_name_is_refused_when_it_is_added(name, clashing_first):
    names = [name, "default"] if clashing_first else ["default", name]
    model = get_peft_model(base_model(), nara_config(target_modules=TARGETS), adapter_name=names[0])
    before = model.state_dict().keys()
    with pytest.raises(ValueError, match=f"adapter '{name}' is named like a part of"):
        model.add_adapter(names[1], nara_config(target_modules=["first"]))
    assert model.state_dict().keys() == before
    assert set(model.peft_config) == {names[0]}


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
