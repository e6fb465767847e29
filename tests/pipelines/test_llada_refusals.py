"""Prompts, arguments, models and folders that the LLaDA pipeline refuses, and what it says of them."""

from __future__ import annotations

import pytest
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

from nara_diffusion.dllm import load_backbone
from pipelines.llada import LLaDAPipeline

from .llada_answers import LENGTH, MODEL, loaded_pipeline


@pytest.fixture
def pipe() -> LLaDAPipeline:
    return loaded_pipeline()


@pytest.mark.parametrize(
    ("prompt", "arguments", "message"),
    [
        ([], {}, r"prompt is \[\], expected a text"),
        (None, {}, "prompt is None, expected a text"),
        (3, {}, "prompt is 3, expected a text"),
        ("", {}, "prompt 0 is empty"),
        (["a", " \n"], {}, "prompt 1 is empty"),
        (["a", 3], {}, "prompt 1 is 3, expected a text or a chat"),
        (["a", []], {}, r"prompt 1 is \[\], expected a text or a chat"),
        ([{"role": "robot", "content": "a"}], {}, "role 'robot', expected one of system, user, assistant"),
        ([{"role": "user"}], {}, r"prompt 0 holds \{'role': 'user'\}, expected"),
        ([{"role": "user", "content": None}], {}, "has the content None, expected a text"),
        ([{"role": "assistant", "content": "a"}], {}, "ends with the assistant's turn, expected the user's"),
        ([{"role": "user", "content": "a"}], {"apply_template": False}, "is a chat, but apply_template is False"),
        ("a", {"gen_length": 12, "block_length": 5}, "block_length 5 doesn't divide gen_length 12"),
        ("a", {"gen_length": 0}, "gen_length is 0"),
        ("a", {"gen_length": 12, "steps": 5, "block_length": 4}, "pass a multiple of 3"),
        ("a" * 100, {}, r"the longest prompt has \d+ tokens and gen_length is 12, .* and the model has 64 positions"),
        ("a", {"num_answers_per_prompt": 0}, "num_answers_per_prompt is 0"),
        ("a", {"callback_on_step_end_tensor_inputs": ["latents"]}, "has 'latents', expected some of 'sequences'"),
    ],
)
def test_refused_prompts_and_arguments(pipe, prompt, arguments, message):
    with pytest.raises(ValueError, match=message):
        pipe(prompt, **{**LENGTH, **arguments})


def test_a_template_may_refuse_a_chat(pipe):
    pipe.tokenizer.chat_template = "{{ raise_exception('no system turns here') }}"
    with pytest.raises(
        ValueError, match=r"prompt 0: the tokenizer's chat template refuses .* \(no system turns here\)"
    ):
        pipe([{"role": "user", "content": "a"}], **LENGTH)
    pipe.tokenizer.chat_template = None
    with pytest.raises(ValueError, match="is a chat, but the tokenizer has no chat template: pass a text"):
        pipe([{"role": "user", "content": "a"}], **LENGTH)


def test_models_that_cannot_unmask_are_refused(pipe):
    sizes = {"hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 1, "num_attention_heads": 4}
    causal = LlamaForCausalLM(LlamaConfig(vocab_size=284, **sizes))
    causal.config.mask_token_id = 283
    with pytest.raises(ValueError, match="is a LlamaForCausalLM that sees only what stands before each token"):
        LLaDAPipeline(causal, pipe.tokenizer)
    causal.config.is_causal = False
    del causal.config.mask_token_id
    with pytest.raises(ValueError, match="no mask_token_id"):
        LLaDAPipeline(causal, pipe.tokenizer)
    wrapped = get_peft_model(load_backbone(str(MODEL))[0], LoraConfig(target_modules=["q_proj"]))
    with pytest.raises(ValueError, match=r"transformer is a PeftModel.*by pipe.load_nara_weights"):
        LLaDAPipeline(wrapped, pipe.tokenizer)


def test_a_folder_that_holds_neither_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"holds neither model_index\.json, as a pipeline does, nor config\.json"):
        LLaDAPipeline.from_pretrained(tmp_path)
