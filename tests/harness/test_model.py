"""The model that lm-eval is given: what it is loaded from, its prompts, and what is kept of a run that stops."""

from __future__ import annotations

import inspect
import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PromptTuningConfig, get_peft_model

from nara_diffusion.dllm import encode_prompts, load_backbone, prompt_text
from nara_diffusion.harness.loading import _OWN_ARGUMENTS, load_model
from nara_diffusion.harness.model import NaraDLLM
from nara_diffusion.harness.prompts import encode
from tests.dllm.generation_reference import reference_generate

from .conftest import LLADA_TINY, make_adapter
from .harness_calls import logits_at, requests


class Noted:
    """As lm-eval's CacheHook, which puts what is done so far on disk."""

    def __init__(self) -> None:
        self.done: dict[tuple, Any] = {}

    def add_partial(self, attr: str, req: Any, res: Any) -> None:
        self.done[attr, str(req)] = res


@pytest.mark.parametrize("kind", ["generate_until", "loglikelihood", "loglikelihood_rolling"])
def test_what_is_done_is_cached_at_once(harness: NaraDLLM, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """So that --use_cache lets a run go on that was stopped in the middle."""
    monkeypatch.setattr("nara_diffusion.harness.model._GROUP", 1)
    monkeypatch.setattr(harness, "batch_size", 1)
    harness.samples, harness.greedy = 3, False
    given = {
        "generate_until": [("a", {"gen_length": 2}), ("b", {"gen_length": 2}), ("c", {"gen_length": 2})],
        "loglikelihood": [("a", " x"), ("b", " y"), ("c", " z")],
        "loglikelihood_rolling": [("ab",), ("cd",), ("ef",)],
    }[kind]
    expected = getattr(harness, kind)(requests(kind, *given))
    noted = Noted()
    monkeypatch.setattr(harness, "cache_hook", noted)
    calls = itertools.count()
    inner = "_generated" if kind == "generate_until" else "_log_likelihoods"
    original = getattr(harness, inner)

    def stopped(*args: Any) -> Any:
        if next(calls) == 2:
            raise KeyboardInterrupt
        return original(*args)

    monkeypatch.setattr(harness, inner, stopped)
    with pytest.raises(KeyboardInterrupt):
        getattr(harness, kind)(requests(kind, *given))
    assert noted.done == {(kind, str(args)): value for args, value in zip(given[:2], expected[:2], strict=True)}


def test_a_question_in_the_template_is_the_prompt_of_training(harness: NaraDLLM) -> None:
    assert harness.chat_template(True) == harness.tokenizer.chat_template
    text = harness.apply_chat_template([{"role": "user", "content": "reverse: planet"}])
    assert text == prompt_text(harness.tokenizer, "reverse: planet")
    expected = encode_prompts(harness.tokenizer, [text])[0]
    assert encode(harness.tokenizer, text, has_template=harness.has_template) == expected
    begun = harness.apply_chat_template(
        [{"role": "user", "content": "reverse: planet"}, {"role": "assistant", "content": "ten"}], False
    )
    assert begun == text + "ten"


# ---------------------------------------------------------------------- loading


def test_the_adapter_says_what_model_it_belongs_to(adapter: Path, harness: NaraDLLM) -> None:
    loaded = NaraDLLM(peft=str(adapter), batch_size="2", device="cpu")
    tokens = encode(harness.tokenizer, "upper: ab", has_template=False)
    assert torch.equal(logits_at(loaded, tokens, 0.4), logits_at(harness, tokens, 0.4))


def test_a_plain_lora_is_evaluated_too(tmp_path: Path) -> None:
    base, _ = load_backbone(str(LLADA_TINY))
    model = get_peft_model(base, LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False))
    model.save_pretrained(tmp_path)
    harness = NaraDLLM(str(LLADA_TINY), str(tmp_path), device="cpu", dtype="float32")
    tokens = encode(harness.tokenizer, "upper: ab", has_template=False)
    with torch.no_grad():
        expected = model.eval()(torch.tensor([tokens])).logits
        assert torch.equal(harness.model(torch.tensor([tokens])).logits, expected)
    (text,) = harness.generate_until(requests("generate_until", ("upper: ab", {"gen_length": 2})))
    assert isinstance(text, str)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "names no model"),
        ({"gen_length": 12}, "gen_length in --model_args: .* belong to --gen_kwargs"),
        ({"batch_size": "auto"}, "--batch_size auto: .* name one"),
        ({"batch_size": 0}, "--batch_size 0"),
        ({"pretraned": "x"}, "--model_args has pretraned, which nara_dllm doesn't know; it takes pretrained, peft, "),
        ({"dtype": "float12"}, "dtype is 'float12', expected auto"),
        ({"device": "cuda:99"}, "device 'cuda:99' can't be used: "),
        ({"samples": "many"}, "samples is 'many', expected a whole number, 1 or more"),
        ({"samples": 0}, "samples is 0, expected a whole number, 1 or more"),
        ({"max_length": 0}, "max_length is 0, expected a whole number, 1 or more"),
        ({"max_length": 2.5}, r"max_length is 2\.5, expected a whole number"),
        ({"seed": "x"}, "seed is 'x', expected a whole number, 0 or more"),
    ],
)
def test_impossible_arguments_are_told(arguments: dict[str, Any], message: str) -> None:
    model = {} if message == "names no model" else {"pretrained": str(LLADA_TINY)}
    with pytest.raises(ValueError, match=message):
        NaraDLLM(**{"device": "cpu", **model, **arguments})


def test_own_arguments_are_those_of_the_signatures() -> None:
    ways = [*inspect.signature(NaraDLLM).parameters, *inspect.signature(load_model).parameters]
    others = {"batch_size", "max_batch_size", "device", "loading", "backbone"}  # lm-eval's flags; the rest
    assert set(_OWN_ARGUMENTS) == set(ways) - others


@pytest.mark.parametrize("pretrained", [None, str(LLADA_TINY)])
def test_an_adapter_that_is_not_there_is_named(tmp_path: Path, pretrained: str | None) -> None:
    with pytest.raises(ValueError, match=r"There is no folder 'outputs/dllm-9', and an adapter of PEFT's .* not r"):
        NaraDLLM(pretrained, "outputs/dllm-9", device="cpu")
    with pytest.raises(
        ValueError, match=r"There is no 'adapter_config.json' in the folder '.*': name a folder of an ad"
    ):
        NaraDLLM(pretrained, str(tmp_path), device="cpu")


def test_an_adapter_with_another_noise_level_is_refused(tmp_path: Path) -> None:
    make_adapter(tmp_path, noise_convention="flow")
    with pytest.raises(ValueError, match="was trained with λ as 'flow', and the λ of a masked-diffusion"):
        NaraDLLM(str(LLADA_TINY), str(tmp_path), device="cpu")


def test_a_model_in_four_bits_answers_nearly_as_the_whole_one(adapter: Path, harness: NaraDLLM) -> None:
    pytest.importorskip("bitsandbytes")
    small = NaraDLLM(str(LLADA_TINY), str(adapter), device="cpu", load_in_4bit=True, dtype="float32")
    layer = small.model.get_submodule("base_model.model.model.layers.0.self_attn.q_proj.base_layer")
    assert type(layer).__name__ == "Linear4bit"
    tokens = encode(harness.tokenizer, "upper: ab", has_template=False)
    ours, theirs = logits_at(small, tokens, 0.4), logits_at(harness, tokens, 0.4)
    assert 0 < (ours - theirs).norm() < 0.3 * theirs.norm()


def test_no_hook_moves_weights_about(harness: NaraDLLM) -> None:
    """PEFT hooks a model that has a map of devices with the CPU on it."""
    assert [name for name, module in harness.model.named_modules() if hasattr(module, "_hf_hook")] == []


def test_virtual_tokens_stand_before_each_text(tmp_path: Path, harness: NaraDLLM) -> None:
    """Prompt tuning: logits of the text alone, answers and likelihoods as the model with its tokens gives them."""
    base, _ = load_backbone(str(LLADA_TINY))
    model = get_peft_model(base, PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)).eval()
    model.save_pretrained(tmp_path)
    tuned = NaraDLLM(str(LLADA_TINY), str(tmp_path), device="cpu")
    assert tuned.max_length == 61

    @torch.no_grad()
    def logits(tokens: list[int], _: float = 0.0) -> torch.Tensor:
        return model(torch.tensor([tokens])).logits[0, 3:].double()

    prompt = encode(harness.tokenizer, "upper: ab", has_template=False)
    answer, _ = reference_generate(logits, prompt, gen_length=4, steps=2, block_length=4, mask=283)
    ask = {"gen_length": 4, "steps": 2, "until": []}
    tuned.ends = []
    (text,) = tuned.generate_until(requests("generate_until", ("upper: ab", ask)))
    assert text == harness.tokenizer.decode(answer, skip_special_tokens=True)
    ((value, _),) = tuned.loglikelihood(requests("loglikelihood", ("upper: ", "A")))
    whole = encode(harness.tokenizer, "upper: A", has_template=False)
    expected = logits([*whole[:-1], 283]).log_softmax(-1)[-1, whole[-1]].item()
    assert value == pytest.approx(expected, rel=1e-5)
