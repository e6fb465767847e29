"""dllm.py on a random LLaDA-MoE: it learns as LLaDA does, and its folder loads, reads λ and answers."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file

from nara_diffusion import noise_level
from nara_diffusion.dllm import encode_prompts, generate, load_backbone, prompt_text, read_noise_from_input_ids
from nara_diffusion.dllm.text_arguments import Arguments
from nara_diffusion.dllm.train import main
from tests.acceptance._runs import TEXT, block_flags
from tests.helpers.mixtures import LLADA_MOE, MASK, write_checkpoint
from tests.helpers.rounding import assert_far, assert_near


@pytest.mark.slow
def test_llada_moe_is_trained_saved_loaded_and_sampled(tmp_path: Path) -> None:
    flags = block_flags(tmp_path)
    write_checkpoint(tmp_path / "moe", LLADA_MOE)
    flags |= {
        "pretrained_model_name_or_path": tmp_path / "moe",
        "output_dir": tmp_path / "run",
        "gen_length": 4,
        "max_train_steps": 30,
        "train_batch_size": 8,
        "learning_rate": 3e-2,
        "core_learning_rate": 3e-2,
        "rank": 8,
        "lora_alpha": 8.0,
        "checkpointing_steps": None,
    }
    results = main(Arguments(**{name: str(v) if isinstance(v, Path) else v for name, v in flags.items()}))
    assert results["validation_loss_after"] < 0.9 * results["validation_loss_before"]
    tensors = load_file(tmp_path / "run" / TEXT)
    assert not [key for key in tensors if "gate." in key or "experts" in key]
    assert sum("lora_A" in key for key in tensors) == 3 * 4 + 3  # attention of three layers, the dense MLP of one
    config = json.loads((tmp_path / "run" / "adapter_config.json").read_text())
    assert config["noise_convention"] == "masked_share"

    model, tokenizer = load_backbone(str(tmp_path / "moe"))
    sample = json.loads((tmp_path / "run" / "samples.jsonl").read_text().splitlines()[0])
    prompt = torch.tensor(encode_prompts(tokenizer, [prompt_text(tokenizer, sample["instruction"])]))
    adapted = PeftModel.from_pretrained(model, tmp_path / "run").eval()
    answer = generate(adapted, prompt, gen_length=4)[0, -4:]
    assert tokenizer.decode(answer, skip_special_tokens=True) == sample["after"] != sample["before"]
    assert "w20 w21" in sample["after"]
    text = torch.tensor([[7, 8, 9, 10, MASK, MASK, 20, MASK]])
    with torch.no_grad():
        with read_noise_from_input_ids(adapted, [4]):
            read = adapted(text).logits
        with noise_level(adapted, 3 / 4):  # of the answer
            assert_near(read, adapted(text).logits, adapted)
        with noise_level(adapted, 0.05):
            assert_far(read, adapted(text).logits)
