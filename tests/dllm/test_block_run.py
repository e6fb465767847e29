"""dllm.py on a random LLaDA2: it learns, its folder loads into LLaDA2Pipeline, and all weights can be trained."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import BlockRefinementScheduler, LLaDA2Pipeline
from safetensors.torch import load_file

from nara_diffusion.dllm import encode_prompts, load_backbone, prompt_text
from nara_diffusion.dllm.sampler import answer_prompts
from nara_diffusion.dllm.text_arguments import Arguments
from nara_diffusion.dllm.train import main
from tests.acceptance._runs import block_flags
from tests.helpers.mixtures import MASK


def arguments(folder: Path, **changes: Any) -> Arguments:
    flags = block_flags(folder) | {"output_dir": folder / "run"} | changes
    return Arguments(**{name: str(value) if isinstance(value, Path) else value for name, value in flags.items()})


def test_a_run_learns_and_its_folder_answers_alike_in_the_pipeline_and_in_generate(tmp_path: Path) -> None:
    how = {
        "max_train_steps": 40,
        "train_batch_size": 8,
        "learning_rate": 3e-2,
        "rank": 8,
        "lora_alpha": 8.0,
        "checkpointing_steps": 40,
    }
    results = main(arguments(tmp_path, **how))
    run = tmp_path / "run"
    assert results["validation_loss_after"] < 0.9 * results["validation_loss_before"]
    config = json.loads((run / "adapter_config.json").read_text())
    assert (config["noise_convention"], config["noise_level_per"]) == ("masked_share_of_block", "part")
    code = (run / "README.md").read_text().split("```python")[1].split("```")[0]
    exec(code, {})

    model, tokenizer = load_backbone(str(tmp_path / "model"))
    rows = [json.loads(line) for line in (tmp_path / "test.jsonl").read_text().splitlines()]
    prompts = encode_prompts(tokenizer, [prompt_text(tokenizer, row["instruction"]) for row in rows])
    pipe: Any = LLaDA2Pipeline(model=model, scheduler=BlockRefinementScheduler(), tokenizer=tokenizer)
    pipe.set_progress_bar_config(disable=True)
    rule = {"gen_length": 8, "confidence_threshold": 0.6, "stop_at_eos": False}
    of_pipe = {"gen_length": 8, "block_length": 4, "num_inference_steps": 4, "threshold": 0.6, "output_type": "seq"}
    of_pipe |= {"editing_threshold": None, "eos_early_stop": False, "mask_token_id": MASK}
    base = [answer_prompts(model, [prompt], **rule).answers for prompt in prompts]
    pipe.load_nara_weights(run)
    for prompt, of_base in zip(prompts, base, strict=True):
        expected = answer_prompts(model, [prompt], **rule).answers
        assert pipe(input_ids=torch.tensor([prompt]), **of_pipe).sequences.equal(expected)
        assert not expected.equal(of_base)


@pytest.mark.parametrize("adapter", ["nara", "full"])
def test_a_run_with_blocks_of_its_own_is_loaded_by_its_card(tmp_path: Path, adapter: str) -> None:
    how = {"block_length": 2, "max_train_steps": 1, "checkpointing_steps": None, "adapter": adapter}
    main(arguments(tmp_path, **how))
    card, scope = (tmp_path / "run" / "README.md").read_text(), {}
    exec(card.split("```python")[1].split("```")[0], scope)
    assert scope["model"].config.block_length == 2
    assert scope["tokens"].shape[1] == scope["prompt"].shape[1] + 8
    assert ("the masked share of the answer in each block" in card) == (adapter == "nara")


def test_full_fine_tuning_writes_a_model_in_the_public_format(tmp_path: Path) -> None:
    main(arguments(tmp_path, adapter="full", max_train_steps=2, learning_rate=1e-3))
    before, after = load_file(tmp_path / "model/model.safetensors"), load_file(tmp_path / "run/model.safetensors")
    assert before.keys() == after.keys()
    still = [name for name, tensor in after.items() if torch.equal(tensor, before[name].to(tensor.dtype))]
    # experts that no token has chosen, and the bias of the choice, keep their values
    assert all(".experts." in name or name.endswith("expert_bias") for name in still)
    model, _ = load_backbone(str(tmp_path / "run"))
    assert (model.config.block_length, model.config.mask_token_id) == (4, MASK)
    loaded = model.get_input_embeddings().weight
    torch.testing.assert_close(loaded, after["model.word_embeddings.weight"])


def test_virtual_tokens_are_refused_before_training(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="20 virtual tokens"):
        main(arguments(tmp_path, adapter="prompt_tuning"))
