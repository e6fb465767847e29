"""`load_adapter` and `from_pretrained` of transformers' own models, against PEFT's loading of the same folder."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from peft import PeftConfig, PeftModel, get_peft_model
from peft.utils.save_and_load import load_peft_weights
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from nara_diffusion import NaraConfig, noise_level
from tests.helpers.adapted import adapted, disturb

IDS = torch.randint(2, 49, (3, 14), generator=torch.Generator().manual_seed(0))
LEVELS = torch.tensor([0.05, 0.5, 0.93])


@pytest.fixture
def base(tmp_path: Path) -> Path:
    """The folder of a small Llama."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=50, hidden_size=24, intermediate_size=40, num_hidden_layers=2, num_attention_heads=4
    )
    LlamaForCausalLM(config).save_pretrained(tmp_path / "base")
    return tmp_path / "base"


def save_adapter(base: Path, folder: Path, **options: object) -> Path:
    torch.manual_seed(1)
    model = get_peft_model(
        LlamaForCausalLM.from_pretrained(base), NaraConfig(r=3, target_modules=["q_proj", "v_proj"], **options)
    )
    disturb(model)
    model.save_pretrained(folder)
    return folder


def output(model: nn.Module) -> Tensor:
    with torch.no_grad(), noise_level(model, LEVELS):
        return model(input_ids=IDS).logits


def peft_output(base: Path, folder: Path, dtype: torch.dtype = torch.float32) -> Tensor:
    model = LlamaForCausalLM.from_pretrained(base, dtype=dtype)
    return output(PeftModel.from_pretrained(model, folder, autocast_adapter_dtype=False).eval())  # as transformers does


def test_an_adapter_in_bfloat16_is_the_one_that_peft_loads_and_isnt_swapped(base, tmp_path):
    folder = save_adapter(base, tmp_path / "nara", core_sharing="module_type", rank_pattern={"v_proj": 5})
    model = LlamaForCausalLM.from_pretrained(base, dtype=torch.bfloat16)
    report = model.load_adapter(folder)
    expected = peft_output(base, folder, torch.bfloat16)
    assert torch.equal(output(model), expected)
    assert not any(report.to_dict().values())
    assert not any(parameter.requires_grad for name, parameter in model.named_parameters() if "default" in name)
    assert not model.training
    with pytest.raises(ValueError, match=r"has an adapter 'default', and load_adapter swaps no NaRA"):
        model.load_adapter(folder, hotswap=True)
    assert torch.equal(output(model), expected)


def test_tensors_and_a_configuration_to_be_trained_further_or_refused(base, tmp_path):
    folder = save_adapter(base, tmp_path / "nara")
    model = LlamaForCausalLM.from_pretrained(base)
    config, tensors, names = PeftConfig.from_pretrained(folder), load_peft_weights(folder), list(model.state_dict())
    layers = {name: tensor for name, tensor in tensors.items() if "nara_core" not in name}
    with pytest.raises(ValueError, match=r"lacks '.*nara_core"):
        model.load_adapter(peft_config=config, adapter_state_dict=layers)
    assert list(model.state_dict()) == names
    model.load_adapter(peft_config=config, adapter_state_dict=tensors, is_trainable=True)
    assert torch.equal(output(model), peft_output(base, folder))
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert trained == {name for name, _ in model.named_parameters() if "lora_" in name or "nara_core" in name}
    assert config.inference_mode  # the caller's own, as it was


def test_generation_reads_the_level_of_the_context(tiny_llama):
    model = adapted(tiny_llama, target_modules=["q_proj", "v_proj", "down_proj"], task_type="CAUSAL_LM")
    ids = torch.randint(1, 49, (2, 4))
    options = {"attention_mask": torch.ones_like(ids), "max_new_tokens": 8, "do_sample": False, "eos_token_id": None}
    with noise_level(model, torch.tensor([0.1, 0.9])):
        both = model.generate(input_ids=ids, **options)
    options["attention_mask"] = options["attention_mask"][:1]
    for i, level in enumerate((0.1, 0.9)):
        with noise_level(model, level):
            assert torch.equal(model.generate(input_ids=ids[i : i + 1], **options), both[i : i + 1])
    with pytest.raises(ValueError, match="λ is not known"):
        model.generate(input_ids=ids[:1], **options)
