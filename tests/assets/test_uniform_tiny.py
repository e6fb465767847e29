"""The shipped uniform-tiny: llada-tiny's format, and answers that it repairs with no token that says what was lost."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tiny_text.uniform import noise_tokens

from nara_diffusion.dllm import load_backbone

MODEL = Path(__file__).parents[2] / "examples" / "assets" / "uniform-tiny"
LLADA = MODEL.with_name("llada-tiny")


def test_format_and_tokenizer_are_lladas():
    own, other = (load_file(folder / "model.safetensors") for folder in (MODEL, LLADA))
    assert {key: (tensor.shape, tensor.dtype) for key, tensor in own.items()} == {
        key: (tensor.shape, tensor.dtype) for key, tensor in other.items()
    }
    assert not any(torch.equal(own[key], other[key]) for key in own)
    for file in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        assert (MODEL / file).read_text() == (LLADA / file).read_text()


@pytest.mark.parametrize(
    ("question", "given", "answer"),
    [
        ("reverse: planet", "te7alz", "tenalp"),
        ("copy: basket", "b4rk2t", "basket"),
        ("upper: kqzv", "k0zv", "KQZV"),
        ("rotate: garden", "xq3 7z", "ardeng"),
    ],
)
def test_the_model_repairs_answers(question, given, answer):
    model, tokenizer = load_backbone(MODEL)
    chat = [{"role": "user", "content": question}]
    prompt = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    tokens = tokenizer(prompt + given + "<|eot_id|>", add_special_tokens=False, return_tensors="pt").input_ids
    with torch.no_grad():
        said = model(tokens).logits[0, -len(answer) - 1 :].argmax(-1)
    assert tokenizer.decode(said) == answer + "<|eot_id|>"


def test_tokens_of_the_noise_are_known_to_the_model():
    model, tokenizer = load_backbone(MODEL)
    tokens = noise_tokens(tokenizer)
    assert len(set(tokens.tolist())) == 39
    assert int(tokens.max()) < model.config.vocab_size


def test_the_card_and_the_curve_agree_with_the_results():
    results = json.loads((MODEL / "results.json").read_text())
    card = (MODEL / "README.md").read_text()
    names, *_, last = (line.split(",") for line in (MODEL / "training_curve.csv").read_text().splitlines())
    row = dict(zip(names, last, strict=True))
    assert int(row["step"]) == results["steps"]
    assert float(row["validation_loss"]) == results["validation_loss"] < 0.2
    assert f"{results['validation_loss']:.3f}" in card
    assert all(f"| {level} | {loss:.3f} |" in card for level, loss in results["losses"].items())
    assert results["parameters"] == sum(tensor.numel() for tensor in load_file(MODEL / "model.safetensors").values())


def test_the_folder_is_small():
    assert sum(file.stat().st_size for file in MODEL.iterdir()) < 6 * 2**20
