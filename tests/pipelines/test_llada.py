"""The LLaDA pipeline beside what the acceptance suite shows: chats, saving for others, offload, refusals."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DiffusionPipeline
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

from nara_diffusion.dllm import load_backbone, prompt_text
from nara_diffusion.dllm.decoding import CHAT_BLOCK_LENGTHS
from pipelines.llada import LLaDAPipeline

ROOT = Path(__file__).parents[2]
MODEL = str(ROOT / "examples" / "assets" / "llada-tiny")
LENGTH: dict[str, Any] = {"gen_length": 12}
USER = {"role": "user", "content": "reverse: planet"}


@pytest.fixture(scope="module")
def pipe() -> LLaDAPipeline:
    pipe = LLaDAPipeline.from_pretrained(MODEL)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def test_chats_are_answered_alone_and_together(pipe: LLaDAPipeline) -> None:
    turns = [{"role": "user", "content": "upper: planet"}, {"role": "assistant", "content": "PLANET"}, USER]
    chat = pipe.tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
    expected = pipe(chat, **LENGTH, apply_template=False)
    assert torch.equal(pipe(turns, **LENGTH).sequences, expected.sequences)
    assert pipe([turns, [USER]], **LENGTH).texts == [*expected.texts, "tenalp"]


def test_several_answers_a_prompt_differ_at_a_temperature(pipe: LLaDAPipeline) -> None:
    options = {**LENGTH, "temperature": 3.0, "num_answers_per_prompt": 2}
    result = pipe(["upper: planet", "sort: zebra"], **options, generator=torch.Generator().manual_seed(0))
    starts = result.prompt_lengths.tolist()
    assert starts[0] == starts[1] != starts[2] == starts[3]
    assert not torch.equal(result.answers[0], result.answers[1])


def test_a_chat_prompt_is_answered_in_the_blocks_of_the_models_own_chat(
    pipe: LLaDAPipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(CHAT_BLOCK_LENGTHS, "llama", 3)
    for template, settings, block in ((True, {}, 3), (False, {}, 12), (True, {"block_length": 6}, 6)):
        text = USER["content"] if template else pipe.prompt_text(USER["content"])
        expected = pipe(text, **LENGTH, apply_template=template, block_length=block)
        order: list[int] = []

        def watch(pipe: Any, step: int, level: Any, tensors: dict[str, torch.Tensor], order: list[int] = order) -> None:
            order.extend(j for j in range(12) if not tensors["masked"][0, j] and j not in order)

        names = {"callback_on_step_end": watch, "callback_on_step_end_tensor_inputs": ["masked"], "stop_at_eos": False}
        found = pipe(text, **LENGTH, apply_template=template, **settings, **names)
        assert [j // block for j in order] == sorted(j // block for j in order)  # block after block
        assert block < 12 or order != sorted(order)
        assert found.texts == expected.texts


def test_callback_sees_each_step_and_changes_it(pipe: LLaDAPipeline) -> None:
    seen = []

    def callback(given: Any, step: int, noise_level: torch.Tensor, tensors: dict[str, torch.Tensor]) -> dict[str, Any]:
        seen.append((step, noise_level.item(), tensors["masked"].float().mean().item()))
        tensors["sequences"][:, -1] = pipe.tokenizer.eos_token_id  # the last place of the answer
        return {"sequences": tensors["sequences"]}

    names = ["sequences", "masked"]
    result = pipe(USER["content"], **LENGTH, callback_on_step_end=callback, callback_on_step_end_tensor_inputs=names)
    assert [step for step, _, _ in seen] == list(range(result.forwards))
    assert seen[0][1] == 1
    assert seen[1][1] == pytest.approx(seen[0][2] - 1 / 12)  # the token put in by hand is no mask any more
    assert result.answers[0, -1] == pipe.tokenizer.eos_token_id
    untouched = pipe("upper: planet", **LENGTH, callback_on_step_end=lambda *_: None)
    assert untouched.texts == ["PLANET"]


def test_saved_pipeline_is_read_by_diffusers(pipe: LLaDAPipeline, tmp_path: Path) -> None:
    pipe.save_pretrained(tmp_path)
    options = {"custom_pipeline": str(ROOT / "pipelines" / "llada.py"), "trust_remote_code": True}
    loaded: Any = DiffusionPipeline.from_pretrained(tmp_path, **options, dtype=torch.bfloat16)
    loaded.set_progress_bar_config(disable=True)
    assert loaded.dtype == torch.bfloat16
    assert loaded("upper: planet", **LENGTH).texts == ["PLANET"]


def test_without_a_chat_template_the_prompt_is_that_of_training() -> None:
    other = LLaDAPipeline.from_pretrained(MODEL)
    other.tokenizer.chat_template = None
    assert other.prompt_text("sort: zebra") == prompt_text(other.tokenizer, "sort: zebra")
    with pytest.raises(ValueError, match="without a chat template"):
        other([USER], **LENGTH)


def test_prompts_and_arguments_are_refused(pipe: LLaDAPipeline) -> None:
    for prompt, arguments, message in [
        ([], {}, r"prompt is \[\], expected a text"),
        (["a", " \n"], {}, r"prompt ' \\n' is empty"),
        ([{"role": "assistant", "content": "a"}], {}, "doesn't end with the user's turn"),
        ([USER], {"apply_template": False}, "without a chat template"),
        ("a", {"block_length": 5}, "block_length 5 doesn't divide gen_length 12"),
        ("a", {"gen_length": 65}, "gen_length is 65, .* and the model has 64 positions"),
        ("a" * 100, {}, r"the longest prompt has \d+ tokens and gen_length is 12, .* and the model has 64 positions"),
    ]:
        with pytest.raises(ValueError, match=message):
            pipe(prompt, **{**LENGTH, **arguments})


def test_models_that_cannot_unmask_are_refused(pipe: LLaDAPipeline, tmp_path: Path) -> None:
    sizes = {"hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 1, "num_attention_heads": 4}
    causal = LlamaForCausalLM(LlamaConfig(vocab_size=284, **sizes))
    wrapped = get_peft_model(load_backbone(MODEL)[0], LoraConfig(target_modules=["q_proj"]))
    for model, message in ((causal, "LlamaForCausalLM, expected"), (wrapped, r"PeftModel.*pipe\.load_nara_weights")):
        with pytest.raises(ValueError, match=message):
            LLaDAPipeline(model, pipe.tokenizer)
    causal.config.is_causal = False
    with pytest.raises(ValueError, match="no mask_token_id"):
        LLaDAPipeline(causal, pipe.tokenizer)
    with pytest.raises(ValueError, match=r"There is no 'config\.json' in the folder"):
        LLaDAPipeline.from_pretrained(tmp_path)
