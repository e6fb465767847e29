"""The LLaDA pipeline against `generate` itself, through every way in and out, and what it refuses."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import pytest
import torch
from diffusers import DiffusionPipeline
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import BertConfig, BertForMaskedLM, LlamaConfig, LlamaForCausalLM, Qwen2Config

from nara_diffusion import NaraConfig
from nara_diffusion.dllm import encode_prompts, generate, load_backbone, prompt_text
from nara_diffusion.dllm.evaluation import stop_token_ids
from nara_diffusion.dllm.shifted import ShiftedQwen2ForCausalLM
from pipelines.llada import LLaDAPipeline

ROOT = Path(__file__).parents[2]
MODEL = ROOT / "examples" / "assets" / "llada-tiny"
FILE = str(ROOT / "pipelines" / "llada.py")
QUESTIONS = ["reverse: planet", "upper: planet", "sort: zebra"]
LENGTH = {"gen_length": 12}


@pytest.fixture
def pipe() -> LLaDAPipeline:
    loaded = LLaDAPipeline.from_pretrained(MODEL)
    loaded.set_progress_bar_config(disable=True)
    return loaded


@pytest.fixture
def adapter(tmp_path) -> Path:
    """A folder as train_scripts/dllm.py writes it, whose adapter changes answers, by λ too."""
    return save_adapter(tmp_path / "adapter", seed=7)


def save_adapter(folder: Path, seed: int, **options) -> Path:
    adapted(seed, **options).save_pretrained(folder)
    return folder


def adapted(seed: int, **options) -> PeftModel:
    model, _ = load_backbone(str(MODEL))
    settings = {"r": 3, "lora_alpha": 5, "target_modules": ["q_proj", "v_proj"], "core_hidden_dims": (8, 8), **options}
    model = get_peft_model(model, NaraConfig(**settings))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.3)
    return model.eval()


def batch_of(tokenizer, texts: list[str]) -> dict:
    encoded = encode_prompts(tokenizer, texts)
    lengths = [len(ids) for ids in encoded]
    rows = [ids + [0] * (max(lengths) - len(ids)) for ids in encoded]
    return {"input_ids": torch.tensor(rows), "prompt_lengths": lengths}


def by_generate(model, tokenizer, questions: list[str] = QUESTIONS, **options):
    return from_texts(model, tokenizer, [prompt_text(tokenizer, question) for question in questions], **options)


def from_texts(model, tokenizer, texts: list[str], **options):
    ends = stop_token_ids(model, tokenizer)
    return generate(model, **batch_of(tokenizer, texts), **LENGTH, eos_token_id=ends, **options)


def states(pipe: LLaDAPipeline) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in pipe.transformer.state_dict().items()}


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


def test_the_adapter_of_a_training_run_answers_as_in_peft(pipe, adapter):
    base = pipe(QUESTIONS, **LENGTH).sequences
    before = states(pipe)
    pipe.load_nara_weights(adapter)
    model = PeftModel.from_pretrained(load_backbone(str(MODEL))[0], adapter)
    expected = by_generate(model, pipe.tokenizer)
    assert torch.equal(pipe(QUESTIONS, **LENGTH).sequences, expected)
    assert not torch.equal(expected, base)
    pipe.unload_nara_weights()
    assert torch.equal(pipe(QUESTIONS, **LENGTH).sequences, base)
    assert states(pipe).keys() == before.keys()
    assert all(torch.equal(tensor, before[name]) for name, tensor in states(pipe).items())


def test_each_step_is_answered_at_its_own_noise_level(pipe, adapter):
    pipe.load_nara_weights(adapter)
    seen = []
    layer = pipe.transformer.model.layers[0].self_attn.q_proj
    hook = layer.register_forward_pre_hook(lambda module, args: seen.append(args[0].shape[0]))
    told = []
    result = pipe(QUESTIONS, **LENGTH, callback_on_step_end=lambda pipe, step, level, tensors: told.append(level))
    hook.remove()
    assert len(told) == len(seen) == result.forwards
    assert told[0].tolist() == [1.0, 1.0, 1.0]
    assert all((later <= earlier).all() for earlier, later in pairwise(told))


def test_adapters_are_saved_mixed_and_switched(pipe, adapter, tmp_path):
    second = save_adapter(tmp_path / "second", seed=8, r=4)
    base = pipe(QUESTIONS, **LENGTH).sequences
    pipe.load_nara_weights(adapter, adapter_name="first")
    first = pipe(QUESTIONS, **LENGTH).sequences
    pipe.load_nara_weights(second, adapter_name="second")
    pipe.set_adapters("second")
    assert pipe.get_active_adapters() == ["second"]
    alone = pipe(QUESTIONS, **LENGTH).sequences
    pipe.set_adapters(["first", "second"], [1.0, 0.0])
    assert torch.equal(pipe(QUESTIONS, **LENGTH).sequences, first)
    pipe.set_adapters(["first", "second"], [0.0, 1.0])
    assert torch.equal(pipe(QUESTIONS, **LENGTH).sequences, alone)
    pipe.save_nara_weights(tmp_path / "saved", "second")
    pipe.disable_lora()
    assert torch.equal(pipe(QUESTIONS, **LENGTH).sequences, base)
    pipe.enable_lora()
    pipe.delete_adapters("first")
    assert pipe.get_list_adapters() == {"transformer": ["second"]}
    pipe.unload_lora_weights()
    assert torch.equal(pipe(QUESTIONS, **LENGTH).sequences, base)
    fresh = LLaDAPipeline.from_pretrained(MODEL)
    fresh.set_progress_bar_config(disable=True)
    fresh.load_nara_weights(tmp_path / "saved")
    assert torch.equal(fresh(QUESTIONS, **LENGTH).sequences, alone)
    assert len({tuple(found.flatten().tolist()) for found in (base, first, alone)}) == 3


def test_half_an_adapter_is_half_its_update(pipe, adapter):
    pipe.load_nara_weights(adapter, adapter_name="weak")
    pipe.set_adapters("weak", 0.5)
    model = PeftModel.from_pretrained(load_backbone(str(MODEL))[0], adapter)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data *= 0.5
    assert torch.equal(pipe(QUESTIONS, **LENGTH).sequences, by_generate(model, pipe.tokenizer))


def test_offload_gives_the_same_answers(pipe, adapter):
    pipe.load_nara_weights(adapter)
    expected = pipe(QUESTIONS, **LENGTH).sequences
    pipe.enable_model_cpu_offload(device="cpu")
    assert hasattr(pipe.transformer, "_hf_hook")
    for _ in range(2):
        assert torch.equal(pipe(QUESTIONS, **LENGTH).sequences, expected)


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
    with pytest.raises(ValueError, match="chat template refuses prompt 0: no system turns here"):
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
