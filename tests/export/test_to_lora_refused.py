"""`to_lora`: what cannot be a plain LoRA is refused by name."""

from __future__ import annotations

import pytest
from peft import LoHaConfig, get_peft_model, inject_adapter_in_model
from torch import nn

from nara_diffusion import to_lora
from tests.export.test_to_lora import LEVEL, TARGETS, base
from tests.helpers.adapted import adapted, lora_config


def test_what_cannot_be_a_lora_is_refused(tmp_path):
    model = adapted(base(), target_modules=TARGETS)
    with pytest.raises(ValueError, match=r"λ is not known.*Pass noise_level"):
        to_lora(model)
    with pytest.raises(ValueError, match="needs a single value"):
        to_lora(model, [0.2, 0.3])
    with pytest.raises(ValueError, match=r"has to lie in \[0, 1\]"):
        to_lora(model, 1.5)
    with pytest.raises(ValueError, match="has no adapter 'other': it has 'default'"):
        to_lora(model, LEVEL, "other")
    with pytest.raises(ValueError, match=r"is no torch\.nn\.Module"):
        to_lora("model", LEVEL)
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="is a file: name a folder"):
        to_lora(model, LEVEL).save_pretrained(tmp_path / "file")
    two = nn.ModuleList([adapted(base(), target_modules=TARGETS) for _ in range(2)])
    with pytest.raises(ValueError, match="2 models inside of ModuleList have an adapter 'default'"):
        to_lora(two, LEVEL)


def test_other_methods_and_variants_are_refused_by_name():
    other = get_peft_model(base(), LoHaConfig(target_modules=TARGETS))
    with pytest.raises(ValueError, match=r"is a LoHa: .*peft\.convert_to_lora"):
        to_lora(other)
    config = lora_config(target_modules=["first"], task_type="CAUSAL_LM", alora_invocation_tokens=[1])
    variant = inject_adapter_in_model(config, base())
    with pytest.raises(ValueError, match="layer 'first', whose LoRA variant is ALoraLinearVariant"):
        to_lora(variant)
    parameter = get_peft_model(base(), lora_config(target_modules=[], target_parameters=["first.weight"]))
    with pytest.raises(ValueError, match=r"target_parameters=\['first.weight'\]"):
        to_lora(parameter)
