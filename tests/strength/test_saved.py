"""The schedule in a NaRA's configuration: saved, loaded, overridden, and refused if it cannot work."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model

from nara_diffusion import set_noise_source, set_strength
from nara_diffusion.noise.signals import NoiseSignals
from tests.helpers.adapted import TwoLayers, disturb, nara_config
from tests.strength.models import LEVELS, SCHEDULE, TARGETS, at, model_of, set_number


def test_a_nara_s_schedule_is_saved_loaded_and_overridden(tmp_path: Path, x):
    model = model_of("NaRA")
    set_strength(model, "default", SCHEDULE)
    expected = at(model, x)
    model.save_pretrained(tmp_path)
    told = json.loads((tmp_path / "adapter_config.json").read_text())
    assert told["strength"] == SCHEDULE.as_lists()
    torch.manual_seed(7)
    loaded = PeftModel.from_pretrained(TwoLayers(), tmp_path)
    assert torch.equal(at(loaded, x), expected)
    loaded.load_adapter(tmp_path, "again")
    loaded.set_adapter("again")
    assert torch.equal(at(loaded, x), expected)
    set_strength(loaded, "again", 0.5)
    assert not torch.equal(at(loaded, x), expected)
    assert loaded.peft_config["again"].strength == SCHEDULE.as_lists()  # a number is for now
    loaded.set_adapter("default")
    set_strength(loaded, "default", None)
    assert torch.equal(at(loaded, x), at(model_of("NaRA"), x))
    loaded.save_pretrained(tmp_path / "none", selected_adapters=["default"])
    assert json.loads((tmp_path / "none" / "adapter_config.json").read_text())["strength"] is None


@pytest.mark.parametrize("core_type", ["hypernetwork", "identity"])
def test_a_configuration_s_schedule_holds_from_the_start(core_type, x):
    torch.manual_seed(7)
    config = nara_config(target_modules=TARGETS, core_type=core_type, strength=SCHEDULE)
    model = get_peft_model(TwoLayers(), config).eval()
    disturb(model)
    clone = model_of("NaRA", core_type=core_type) if core_type == "hypernetwork" else model_of("identity")
    set_strength(clone, "default", SCHEDULE)
    assert torch.equal(at(model, x), at(clone, x))
    assert config.strength == SCHEDULE.as_lists()
    set_number(model, "default", 0.6)
    set_number(clone, "default", 0.6)
    outputs = [at(m, x) if core_type == "hypernetwork" else m(x) for m in (model, clone)]
    assert torch.equal(*outputs)


def test_a_schedule_is_not_given_to_other_models_of_the_same_configuration():
    config = nara_config(target_modules=TARGETS)
    one, two = (get_peft_model(TwoLayers(), config) for _ in range(2))
    set_strength(one, "default", SCHEDULE)
    assert one.peft_config["default"].strength == SCHEDULE.as_lists()
    assert two.peft_config["default"].strength is None is config.strength
    assert one.base_model.model.peft_config["default"].strength == SCHEDULE.as_lists()


def test_an_identity_with_a_schedule_keeps_the_definition_of_its_level(tmp_path: Path):
    class Source:
        def __init__(self, convention: str) -> None:
            self.convention = convention

        def __call__(self, module: Any, args: Any, kwargs: Any) -> NoiseSignals:
            return NoiseSignals(LEVELS)

    model = model_of("identity")
    set_noise_source(model, Source("mine"))
    set_strength(model, "default", SCHEDULE)
    assert model.peft_config["default"].noise_convention == "mine"
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(TwoLayers(), tmp_path)
    with pytest.raises(ValueError, match="trained with λ defined as 'mine'"):
        set_noise_source(loaded, Source("theirs"))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"strength": [[0.2, 1.0], [0.1, 2.0]]}, r"strength is \[\[0.2, 1.0\].*ascending λ"),
        ({"strength": 0.5}, "strength is 0.5: points is 0.5: pass pairs"),
        ({"strength": [[2, 1.0]]}, "λ is 2"),
        ({"strength": SCHEDULE, "lora_bias": True}, r"would not reach the bias of B \(lora_bias=True\)"),
        ({"strength": SCHEDULE, "bias": "all"}, "would not reach the biases that are trained"),
        ({"strength": SCHEDULE, "modules_to_save": ["second"]}, "would not reach modules"),
        ({"strength": SCHEDULE, "core_type": "identity", "init_lora_weights": "pissa"}, "out of the base weights"),
        ({"strength": SCHEDULE, "core_type": "identity", "use_qalora": True}, "use_qalora.*or use strength=None"),
    ],
)
def test_a_configuration_refuses_a_strength_that_cannot_work(changes, message):
    with pytest.raises(ValueError, match=message):
        nara_config(target_modules=["first"], **changes)


def test_a_file_with_a_damaged_strength_is_refused_by_name(tmp_path: Path):
    model_of("NaRA").save_pretrained(tmp_path)
    file = tmp_path / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"strength": [[0.5, None]]}))
    with pytest.raises(ValueError, match=r"adapter_config.json.*strength is \[\[0.5, None\]\]"):
        PeftModel.from_pretrained(TwoLayers(), tmp_path)
