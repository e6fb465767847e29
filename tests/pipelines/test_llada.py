"""The LLaDA pipeline against `generate` itself, step by step, and through every way to save and load it."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from diffusers import DiffusionPipeline
from transformers import BertConfig, BertForMaskedLM, LlamaForCausalLM, Qwen2Config

from nara_diffusion.dllm import prompt_text
from nara_diffusion.dllm.models.shifted_logits import ShiftedQwen2ForCausalLM
from pipelines.llada import LLaDAPipeline

from .llada_answers import FILE, LENGTH, MODEL, QUESTIONS, by_generate, from_texts, loaded_pipeline, states


@pytest.fixture
def pipe() -> LLaDAPipeline:
    return loaded_pipeline()


def test_answers_are_those_of_generate(pipe):
    result = pipe(QUESTIONS, **LENGTH)
    assert result.texts == ["tenalp", "PLANET", "aberz"]
    expected = by_generate(pipe.transformer, pipe.tokenizer, return_stats=True)
    assert torch.equal(result.sequences, expected.sequences)
    assert torch.equal(result.answers, expected.answers)
    assert torch.equal(result.prompt_lengths, expected.prompt_lengths)
    assert result.forwards == expected.forwards


def test_every_sampling_argument_reaches_generate(pipe):
    sampling = {"steps": 6, "block_length": 6, "temperature": 0.8, "cfg_scale": 0.5, "remasking": "random"}
    result = pipe(QUESTIONS, **LENGTH, **sampling, stop_at_eos=False, generator=torch.Generator().manual_seed(3))
    expected = by_generate(
        pipe.transformer, pipe.tokenizer, **sampling, stop_at_eos=False, generator=torch.Generator().manual_seed(3)
    )
    assert torch.equal(result.sequences, expected)
    assert result.forwards == 6
    fast = pipe(QUESTIONS, **LENGTH, confidence_threshold=0.9)
    assert torch.equal(fast.sequences, by_generate(pipe.transformer, pipe.tokenizer, confidence_threshold=0.9))


def test_one_question_is_a_batch_of_one(pipe):
    assert pipe(QUESTIONS[0], **LENGTH).texts == ["tenalp"]
    texts, sequences = pipe(QUESTIONS[0], **LENGTH, return_dict=False)
    assert texts == ["tenalp"]
    assert torch.equal(sequences, by_generate(pipe.transformer, pipe.tokenizer, QUESTIONS[:1]))


def test_chats(pipe):
    user = {"role": "user", "content": QUESTIONS[0]}
    chat = [{"role": "user", "content": "upper: planet"}, {"role": "assistant", "content": "PLANET"}, user]
    assert pipe([user], **LENGTH).texts == ["tenalp"]
    text = pipe.tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    expected = from_texts(pipe.transformer, pipe.tokenizer, [text])
    assert torch.equal(pipe(chat, **LENGTH).sequences, expected)
    assert pipe([chat, [user]], **LENGTH).texts == [*pipe(chat, **LENGTH).texts, "tenalp"]


def test_texts_can_be_taken_as_they_are(pipe):
    text = "<|startoftext|>reverse: planet"
    found = pipe(text, **LENGTH, apply_template=False).sequences
    assert torch.equal(found, from_texts(pipe.transformer, pipe.tokenizer, [text]))
    assert not torch.equal(found, pipe(text, **LENGTH).sequences)


def test_without_a_chat_template_the_prompt_is_that_of_training(pipe):
    pipe.tokenizer.chat_template = None
    assert pipe.prompt_texts("sort: zebra") == [prompt_text(pipe.tokenizer, "sort: zebra")]
    assert "### Instruction:\nsort: zebra" in pipe.prompt_texts("sort: zebra")[0]


def test_several_answers_a_prompt(pipe):
    call = {**LENGTH, "temperature": 3.0, "num_answers_per_prompt": 2}
    result = pipe(QUESTIONS[1:], **call, generator=torch.Generator().manual_seed(0))
    assert len(result.texts) == 4
    starts = result.prompt_lengths.tolist()
    assert starts[0] == starts[1] != starts[2] == starts[3]
    assert not torch.equal(result.answers[0], result.answers[1])


def test_the_bar_counts_tokens(pipe, capsys):
    pipe.set_progress_bar_config(disable=False, unit="token")
    pipe(QUESTIONS, **LENGTH)
    assert "36/36" in capsys.readouterr().err


def test_callback_sees_each_step_and_changes_it(pipe):
    seen = []

    def callback(given, step, noise_level, tensors):
        seen.append((given, step, noise_level, tensors["masked"].float().mean(1)))
        tensors["sequences"][:, -1] = pipe.tokenizer.eos_token_id  # the last place of the longest prompt's answer
        return {"sequences": tensors["sequences"]}

    names = ["sequences", "masked"]
    result = pipe(QUESTIONS[:1], **LENGTH, callback_on_step_end=callback, callback_on_step_end_tensor_inputs=names)
    assert [step for _, step, _, _ in seen] == list(range(result.forwards))
    assert all(given is pipe for given, _, _, _ in seen)
    assert seen[0][2].tolist() == [1.0]
    for (_, _, _, left), (_, _, noise_level, _) in pairwise(seen):
        assert noise_level <= left  # the token put in by hand is no mask any more
    assert result.answers[0, -1] == pipe.tokenizer.eos_token_id
    untouched = pipe(QUESTIONS[:1], **LENGTH, callback_on_step_end=lambda *_: None)
    assert torch.equal(untouched.sequences, pipe(QUESTIONS[:1], **LENGTH).sequences)


def test_a_callback_can_stop(pipe):
    def callback(given, step, noise_level, tensors):
        given._interrupt = step == 1
        return {}

    result = pipe(QUESTIONS, **LENGTH, stop_at_eos=False, callback_on_step_end=callback)
    assert pipe.interrupt
    assert result.forwards == 2
    assert (result.answers == pipe.transformer.config.mask_token_id).sum(1).tolist() == [10, 10, 10]
    assert pipe("upper: planet", **LENGTH).texts == ["PLANET"]  # the next call starts afresh


def test_a_saved_pipeline_is_whole(pipe, tmp_path):
    folder = tmp_path / "pipe"
    pipe.save_pretrained(folder)
    expected = pipe(QUESTIONS, **LENGTH).sequences
    own = LLaDAPipeline.from_pretrained(folder)
    custom = DiffusionPipeline.from_pretrained(folder, custom_pipeline=FILE, trust_remote_code=True)
    assert type(custom).__module__.startswith("diffusers_modules.")
    for loaded in (own, custom):
        loaded.set_progress_bar_config(disable=True)
        assert type(loaded.transformer) is LlamaForCausalLM
        assert torch.equal(loaded(QUESTIONS, **LENGTH).sequences, expected)
        for name, tensor in states(loaded).items():
            assert torch.equal(tensor, states(pipe)[name]), name


def test_dtype_and_device_go_through(tmp_path, pipe):
    assert LLaDAPipeline.from_pretrained(MODEL, dtype=torch.bfloat16).dtype == torch.bfloat16
    assert LLaDAPipeline.from_pretrained(MODEL, dtype=torch.float64).dtype == torch.float64
    pipe.save_pretrained(tmp_path / "pipe")
    options = {"custom_pipeline": FILE, "trust_remote_code": True, "dtype": torch.bfloat16}
    assert DiffusionPipeline.from_pretrained(tmp_path / "pipe", **options).dtype == torch.bfloat16
    assert pipe.to("cpu", torch.bfloat16).dtype == torch.bfloat16
    assert pipe("upper: planet", **LENGTH).texts == ["PLANET"]


def shifted() -> ShiftedQwen2ForCausalLM:
    sizes = {"hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = Qwen2Config(vocab_size=284, num_key_value_heads=2, max_position_embeddings=64, **sizes)
    config.is_causal, config.use_cache, config.shifted_logits = False, False, True
    return ShiftedQwen2ForCausalLM(config)


def encoder() -> BertForMaskedLM:
    sizes = {"hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 2, "num_attention_heads": 4}
    return BertForMaskedLM(BertConfig(vocab_size=284, max_position_embeddings=64, **sizes))


@pytest.mark.parametrize("make", [shifted, encoder])
def test_other_kinds_of_model_are_saved_and_read_alike(make, pipe, tmp_path):
    model = make().eval()
    model.config.mask_token_id = 283
    other = LLaDAPipeline(model, pipe.tokenizer)
    other.set_progress_bar_config(disable=True)
    other.save_pretrained(tmp_path / "pipe")
    expected = other(QUESTIONS, **LENGTH).sequences
    options = {"custom_pipeline": FILE, "trust_remote_code": True}
    for loaded in (
        LLaDAPipeline.from_pretrained(tmp_path / "pipe"),
        DiffusionPipeline.from_pretrained(tmp_path / "pipe", **options),
    ):
        loaded.set_progress_bar_config(disable=True)
        assert type(loaded.transformer) is type(model)
        assert torch.equal(loaded(QUESTIONS, **LENGTH).sequences, expected)
