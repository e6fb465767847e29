"""dllm.py on a random LLaDA2, and on the shipped one: it learns, and its folder loads into LLaDA2Pipeline."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import BlockRefinementScheduler, LLaDA2Pipeline
from safetensors.torch import load_file

from nara_diffusion.dllm import encode_prompts, load_backbone, prompt_text
from nara_diffusion.dllm.models.model_classes import LLaDA2ForCausalLM
from nara_diffusion.dllm.sampler import answer_prompts
from nara_diffusion.dllm.text_arguments import Arguments
from nara_diffusion.dllm.train import main
from tests.acceptance._commands import ROOT, results, run
from tests.acceptance._runs import ASSETS, block_flags
from tests.helpers.mixtures import MASK


def arguments(folder: Path, **changes: Any) -> Arguments:
    flags = block_flags(folder) | {"output_dir": folder / "run"} | changes
    return Arguments(**{name: str(value) if isinstance(value, Path) else value for name, value in flags.items()})


def pipeline(model: Any, tokenizer: Any) -> Any:
    pipe = LLaDA2Pipeline(model=model, scheduler=BlockRefinementScheduler(), tokenizer=tokenizer)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.mark.slow
def test_run_folder_answers_alike_in_pipeline_and_generate(tmp_path: Path) -> None:
    main(arguments(tmp_path, max_train_steps=4, learning_rate=5e-2, checkpointing_steps=None, test_samples=1))
    folder = tmp_path / "run"
    config = json.loads((folder / "adapter_config.json").read_text())
    assert (config["noise_convention"], config["noise_level_per"]) == ("masked_share_of_block", "part")
    code = (folder / "README.md").read_text().split("```python")[1].split("```")[0]
    exec(code, {})

    model, tokenizer = load_backbone(str(tmp_path / "model"))
    model.lm_head.weight.data[MASK] = 0.0  # the pipeline would place masks if they were likeliest
    rows = [json.loads(line) for line in (tmp_path / "test.jsonl").read_text().splitlines()[:2]]
    prompts = encode_prompts(tokenizer, [prompt_text(tokenizer, row["instruction"]) for row in rows])
    pipe = pipeline(model, tokenizer)
    rule = {"gen_length": 8, "confidence_threshold": 0.6, "stop_at_eos": False}
    of_pipe = {"gen_length": 8, "block_length": 4, "num_inference_steps": 4, "threshold": 0.6, "output_type": "seq"}
    of_pipe |= {"editing_threshold": None, "eos_early_stop": False, "mask_token_id": MASK}
    base = [answer_prompts(model, [prompt], **rule).answers for prompt in prompts]
    pipe.load_nara_weights(folder)
    for prompt, of_base in zip(prompts, base, strict=True):
        expected = answer_prompts(model, [prompt], **rule).answers
        assert pipe(input_ids=torch.tensor([prompt]), **of_pipe).sequences.equal(expected)
        assert not expected.equal(of_base)


@pytest.mark.parametrize("adapter", ["nara", "full"])
def test_run_with_chosen_blocks_is_loaded_by_card(tmp_path: Path, adapter: str) -> None:
    how = {"block_length": 2, "max_train_steps": 1, "checkpointing_steps": None, "adapter": adapter, "test_samples": 1}
    main(arguments(tmp_path, **how))
    card, scope = (tmp_path / "run" / "README.md").read_text(), {}
    exec(card.split("```python")[1].split("```")[0], scope)
    assert scope["model"].config.block_length == 2
    assert scope["tokens"].shape[1] == scope["prompt"].shape[1] + 8
    assert ("the masked share of the answer in each block" in card) == (adapter == "nara")


def answers(pipe: Any, rows: list[dict[str, str]]) -> list[str]:
    """What the pipeline writes to each row, by the shipped model's blocks of 16."""
    how = {"gen_length": 16, "block_length": 16, "num_inference_steps": 16, "threshold": 0.95}
    return [pipe(row["instruction"], **how, editing_threshold=None).texts[0] for row in rows]


def test_shipped_model_answers_its_training_in_the_pipeline() -> None:
    model, tokenizer = load_backbone(str(ASSETS / "llada2-tiny"))
    assert (type(model), model.config.block_length) == (LLaDA2ForCausalLM, 16)
    pipe = pipeline(model, tokenizer)
    rows = [{"instruction": question} for question in ("reverse: planet", "upper: planet", "double: abc")]
    assert answers(pipe, rows) == ["tenalp", "PLANET", "abcabc"]


@pytest.mark.slow
def test_configured_run_learns_and_answers_in_the_pipeline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    run("dllm.py", config="train_scripts/configs/llada2_tiny.yaml", output_dir=tmp_path / "run")
    figures = results(tmp_path / "run")
    assert (figures["exact_match_before"], figures["n"]) == (0, 256)
    assert figures["exact_match_after"] >= 0.9
    test = Path("examples/assets/two-step/test.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in test[:100]]
    model, tokenizer = load_backbone("examples/assets/llada2-tiny")
    pipe = pipeline(model, tokenizer)
    pipe.load_nara_weights(tmp_path / "run")
    right = [text == row["answer"] for text, row in zip(answers(pipe, rows), rows, strict=True)]
    assert sum(right) >= 90
    pipe.unload_nara_weights()
    assert not set(answers(pipe, rows[:9])) & {row["answer"] for row in rows[:9]}


@pytest.mark.slow
def test_full_fine_tuning_writes_the_public_format(tmp_path: Path) -> None:
    main(arguments(tmp_path, adapter="full", max_train_steps=2, learning_rate=1e-3, test_samples=1))
    original, trained = load_file(tmp_path / "model/model.safetensors"), load_file(tmp_path / "run/model.safetensors")
    assert original.keys() == trained.keys()
    still = [name for name, tensor in trained.items() if torch.equal(tensor, original[name].to(tensor.dtype))]
    # experts that no token has chosen, and the bias of the choice, keep their values
    assert all(".experts." in name or name.endswith("expert_bias") for name in still)
    model, _ = load_backbone(str(tmp_path / "run"))
    assert (model.config.block_length, model.config.mask_token_id) == (4, MASK)
    loaded = model.get_input_embeddings().weight
    torch.testing.assert_close(loaded, trained["model.word_embeddings.weight"])


def test_virtual_tokens_are_refused_before_training(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="20 virtual tokens"):
        main(arguments(tmp_path, adapter="prompt_tuning"))
