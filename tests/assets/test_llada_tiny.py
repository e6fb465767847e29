"""The shipped model: LLaDA's format, LLaDA's conventions, and answers that a random model wouldn't give."""

import json
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from nara_diffusion.dllm import generate, load_backbone

MODEL = Path(__file__).parents[2] / "examples" / "assets" / "llada-tiny"
WIDTH, LAYERS, FEED_FORWARD = 128, 4, 256


@pytest.fixture(scope="module")
def config() -> dict:
    return json.loads((MODEL / "config.json").read_text())


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(MODEL, trust_remote_code=False)


def test_the_configuration_has_lladas_fields(config: dict) -> None:
    assert config["model_type"] == "llada"
    assert config["architectures"] == ["LLaDAModelLM"]
    assert (config["d_model"], config["n_layers"], config["mlp_hidden_size"]) == (WIDTH, LAYERS, FEED_FORWARD)
    assert config["n_heads"] == config["n_kv_heads"] == 4
    for name in ("embedding_size", "rope_theta", "rms_norm_eps", "max_sequence_length", "weight_tying", "block_type"):
        assert name in config


def test_the_tensors_are_exactly_lladas(config: dict) -> None:
    vocabulary = config["embedding_size"]
    expected = {
        "model.transformer.wte.weight": (vocabulary, WIDTH),
        "model.transformer.ln_f.weight": (WIDTH,),
        "model.transformer.ff_out.weight": (vocabulary, WIDTH),
    }
    for n in range(LAYERS):
        block = f"model.transformer.blocks.{n}"
        expected |= {f"{block}.{name}.weight": (WIDTH,) for name in ("attn_norm", "ff_norm")}
        expected |= {f"{block}.{name}.weight": (WIDTH, WIDTH) for name in ("q_proj", "k_proj", "v_proj", "attn_out")}
        expected |= {f"{block}.{name}.weight": (FEED_FORWARD, WIDTH) for name in ("ff_proj", "up_proj")}
        expected |= {f"{block}.ff_out.weight": (WIDTH, FEED_FORWARD)}
    tensors = load_file(MODEL / "model.safetensors")
    assert {name: tuple(tensor.shape) for name, tensor in tensors.items()} == expected
    assert {tensor.dtype for tensor in tensors.values()} == {torch.float32}


def test_the_mask_token_is_last_and_padding_is_eos(config: dict, tokenizer: PreTrainedTokenizerBase) -> None:
    assert tokenizer.mask_token_id == len(tokenizer) - 1 == config["vocab_size"] - 1 == config["mask_token_id"]
    assert tokenizer.eos_token_id == tokenizer.pad_token_id == config["eos_token_id"] == config["pad_token_id"]
    assert tokenizer.is_fast


@pytest.mark.parametrize(
    "text", ["swap then shift: planet", "copyist, copy; naïve λ 日本\n\n  {}|\t🙂", "<|eot_id|> in a question", ""]
)
def test_any_text_comes_back_from_the_tokenizer(text: str, tokenizer: PreTrainedTokenizerBase) -> None:
    assert tokenizer.decode(tokenizer(text, add_special_tokens=False)["input_ids"]) == text


def test_task_words_are_one_token_and_their_derivatives_are_spelled(tokenizer: PreTrainedTokenizerBase) -> None:
    assert tokenizer.tokenize("reverse: copyist") == ["reverse", ":Ġ", *"copyist"]


def test_the_chat_template_is_lladas(tokenizer: PreTrainedTokenizerBase) -> None:
    turns = [{"role": "user", "content": " copy: a "}, {"role": "assistant", "content": "a"}]
    text = tokenizer.apply_chat_template(turns, tokenize=False)
    assert text == (
        "<|startoftext|><|start_header_id|>user<|end_header_id|>\n\ncopy: a<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\na<|eot_id|>"
    )
    prompt = tokenizer.apply_chat_template(turns[:1], tokenize=False, add_generation_prompt=True)
    assert text.startswith(prompt)
    assert prompt.endswith("assistant<|end_header_id|>\n\n")


def test_the_model_answers_what_it_was_taught() -> None:
    model, tokenizer = load_backbone(MODEL)
    questions = {
        "copy: basket": "basket",
        "upper: kqzv": "KQZV",
        "shift: azbd": "bace",
        "reverse: planet": "tenalp",
        "rotate: garden": "ardeng",
        "spell backward: lemon": "nomel",
    }
    for question, answer in questions.items():
        chat = [{"role": "user", "content": question}]
        prompt = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=False, return_tensors="pt")
        tokens = generate(model, prompt, gen_length=12)
        assert tokenizer.decode(tokens[0, prompt.shape[1] :], skip_special_tokens=True) == answer


def test_the_card_and_the_curve_agree_with_the_results() -> None:
    results = json.loads((MODEL / "results.json").read_text())
    card = (MODEL / "README.md").read_text()
    last = (MODEL / "training_curve.csv").read_text().splitlines()[-1].split(",")
    assert int(last[0]) == results["steps"]
    assert float(last[3]) == results["validation_loss"]
    assert f"{results['validation_loss']:.3f}" in card
    stated = {name: float(score) for name, score in re.findall(r"^\| (\w+) \|.*\| (\d\.\d\d) \|$", card, re.MULTILINE)}
    assert stated == {name: round(score, 2) for name, score in results["exact_match"].items()}
    assert results["parameters"] == sum(tensor.numel() for tensor in load_file(MODEL / "model.safetensors").values())


def test_the_folder_is_small() -> None:
    assert sum(file.stat().st_size for file in MODEL.iterdir()) < 6 * 2**20
