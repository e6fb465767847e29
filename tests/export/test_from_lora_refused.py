"""`from_lora`: what can't become a NaRA is refused by name, and the model stays as it was."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from peft import LoHaConfig, get_peft_model, get_peft_model_state_dict
from torch import nn

from nara_diffusion import from_lora
from tests.export.test_from_lora import PATTERNS, TARGETS, base, run, trained_lora
from tests.helpers.adapted import adapted, lora_config

REFUSED: list[tuple[Any, dict[str, Any], str]] = [
    ({}, {"core_init": "kaiming"}, "has a C that is not I at first"),
    ({}, {"core_type": "rank_mask"}, "has a C that is not I at first"),
    ({}, {"core_type": "bins", "core_bins": 2}, "has a C that is not I at first"),
    ({}, {"r": 8, "target_modules": ["first"]}, "r, target_modules can't be given, but come from the LoRA"),
    ({}, {"adapter_name": "a", "core_type": "none"}, "core_type is 'none'"),
]


@pytest.mark.parametrize(("options", "core", "message"), REFUSED)
def test_a_core_that_starts_as_something_else_is_refused_and_the_model_is_as_it_was(tmp_path, options, core, message):
    lora = trained_lora(rank_pattern={}, alpha_pattern={}, **options)
    lora.save_pretrained(tmp_path)
    model = base()
    before = {name: id(module) for name, module in model.named_modules()}
    with pytest.raises(ValueError, match=message):
        from_lora(tmp_path, model, **core)
    assert {name: id(module) for name, module in model.named_modules()} == before
    assert not hasattr(model, "peft_config")
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_other_bases_and_other_files_are_refused(tmp_path):
    lora = trained_lora()
    lora.save_pretrained(tmp_path / "lora")
    with pytest.raises(ValueError, match=r"adapts 2 modules, of which Sequential lacks 2: 'first', 'second'"):
        from_lora(tmp_path / "lora", nn.Sequential(nn.Linear(7, 5)))
    wider = base()
    wider.second = nn.Linear(11, 6)
    with pytest.raises(ValueError, match=r"'second.lora_B.weight' has shape \(5, 2\) in .*needs \(6, 2\)"):
        from_lora(tmp_path / "lora", wider)
    assert type(wider.second) is nn.Linear
    with pytest.raises(ValueError, match="There is no file or folder"):
        from_lora(tmp_path / "none", base())
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"neither adapter_config.json nor one LoRA file"):
        from_lora(tmp_path / "empty", base())
    with pytest.raises(ValueError, match="lora is a int"):
        from_lora(3, base())
    get_peft_model(base(), LoHaConfig(target_modules=TARGETS)).save_pretrained(tmp_path / "loha")
    with pytest.raises(ValueError, match="is a LoHa, which is no LoRA"):
        from_lora(tmp_path / "loha", base())
    adapted(base(), target_modules=TARGETS).save_pretrained(tmp_path / "nara")
    with pytest.raises(ValueError, match="is a NaRA already"):
        from_lora(tmp_path / "nara", base())
    with pytest.raises(ValueError, match="it is a NaRA already"):
        from_lora(adapted(base(), target_modules=TARGETS), base())
    with pytest.raises(ValueError, match="has an adapter 'default' already"):
        from_lora(tmp_path / "lora", adapted(base(), target_modules=TARGETS))
    state = get_peft_model_state_dict(lora)
    with pytest.raises(ValueError, match="but no lora_alpha: pass config="):
        from_lora(state, base())


def test_arguments_that_would_have_no_effect_are_refused(tmp_path):
    lora = trained_lora()
    lora.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="config is for a dict of tensors"):
        from_lora(tmp_path, base(), config=lora_config(target_modules=TARGETS))
    with pytest.raises(ValueError, match=r"source_adapter is 'style', but lora is a (Posix|Windows)Path"):
        from_lora(tmp_path, base(), source_adapter="style")
    with pytest.raises(ValueError, match=r"model is a str: pass a torch\.nn\.Module"):
        from_lora(tmp_path, "a folder")
    with pytest.raises(ValueError, match="config is a dict: pass a LoraConfig"):
        from_lora(dict(get_peft_model_state_dict(lora)), base(), config={"r": 4})


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({}, "The dict holds no tensors"),
        ({"first.lora_A.weight": 3}, "The dict holds 'first.lora_A.weight', which is a int"),
        ({3: torch.zeros(2)}, "The dict holds 3, which is"),
    ],
)
def test_dicts_that_are_no_state_dict_are_refused(given, message):
    for config in (None, lora_config(target_modules=TARGETS)):
        with pytest.raises(ValueError, match=message):
            from_lora(given, base(), config=config)


def test_a_folder_without_whole_weights_is_refused(tmp_path):
    trained_lora().save_pretrained(tmp_path)
    weights = tmp_path / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-10])
    with pytest.raises(ValueError, match="is no whole safetensors file"):
        from_lora(tmp_path, base())
    weights.unlink()
    with pytest.raises(ValueError, match=r"There is no 'adapter_model.safetensors' beside 'adapter_config.json'"):
        from_lora(tmp_path, base())


@pytest.mark.parametrize(
    ("key", "message"),
    [
        ("base_model.model.first.lora_B.weight", "A and B are both needed"),
        (None, "which is no key of a LoRA in PEFT's format"),
    ],
)
def test_damaged_dicts_are_refused(key, message):
    lora = trained_lora()
    state = dict(get_peft_model_state_dict(lora))
    if key is None:
        state["first.lora_C.weight"] = torch.zeros(3)
    else:
        del state[key]
    with pytest.raises(ValueError, match=message):
        from_lora(state, base(), config=lora.peft_config["default"])


def test_a_configuration_of_another_adapter_is_refused():
    lora = trained_lora()
    state = get_peft_model_state_dict(lora)
    with pytest.raises(ValueError, match="has rank 2 in 'second', but its configuration says 4"):
        from_lora(state, base(), config=lora_config(target_modules=TARGETS))
    with pytest.raises(ValueError, match=r"no magnitude \(DoRA\) in 'first', but use_dora=True"):
        from_lora(state, base(), config=lora_config(target_modules=TARGETS, use_dora=True, **PATTERNS))


def test_an_adapter_that_was_there_stays_active_after_a_refusal(tmp_path):
    trained_lora(rank_pattern={}, alpha_pattern={}).save_pretrained(tmp_path)
    model, x = adapted(base(), target_modules=TARGETS), torch.randn(3, 7)
    before, trainable = run(model, x, 0.3), [parameter.requires_grad for parameter in model.parameters()]
    with pytest.raises(ValueError, match="has a C that is not I at first"):
        from_lora(tmp_path, model, "other", core_init="kaiming")
    assert model.active_adapter == "default"
    assert [parameter.requires_grad for parameter in model.parameters()] == trainable
    assert torch.equal(run(model, x, 0.3), before)
