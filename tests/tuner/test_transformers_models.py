"""`load_adapter` and `from_pretrained` of transformers' own models, and their `generate`."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from peft import PeftConfig, get_peft_model
from peft.utils.save_and_load import load_peft_weights
from transformers import LlamaConfig, LlamaForCausalLM

from nara_diffusion import NaraConfig, noise_level
from tests.helpers.adapted import adapted, disturb

IDS = torch.randint(2, 49, (3, 14), generator=torch.Generator().manual_seed(0))


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


def test_a_nara_is_refused_by_name_and_the_model_stays_as_it_was(base, tmp_path):
    folder = save_adapter(base, tmp_path / "nara")
    model = LlamaForCausalLM.from_pretrained(base)
    before, names = model(input_ids=IDS).logits, list(model.state_dict())
    with pytest.raises(ValueError, match=r"nara is a NaRA's, .* PeftModel\.from_pretrained\(model, folder\)"):
        model.load_adapter(folder)
    with pytest.raises(ValueError, match="The configuration is a NaRA's"):
        model.load_adapter(peft_config=PeftConfig.from_pretrained(folder), adapter_state_dict=load_peft_weights(folder))
    with pytest.raises(ValueError, match=r"nara is a NaRA's"):
        LlamaForCausalLM.from_pretrained(folder)
    assert list(model.state_dict()) == names
    assert torch.equal(model(input_ids=IDS).logits, before)


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
