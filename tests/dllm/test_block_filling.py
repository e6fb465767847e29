"""Sampling block by block: compared with a loop by hand, and with itself without the cache."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PromptTuningConfig, get_peft_model
from torch import Tensor

from nara_diffusion.dllm import GenerationStep, generate, load_backbone
from nara_diffusion.dllm.models.backbone import Backbone
from tests.acceptance._text import END, backbone, nara
from tests.helpers.adapted import nara_config
from tests.helpers.mixtures import (
    FAST_DLLM,
    LLADA2,
    MASK,
    SDAR,
    SDAR_MOE,
    VOCABULARY,
    ByHand,
    block_seen,
    write_checkpoint,
)

B = 4
FIELDS = LLADA2 | {"block_length": B}
PROMPTS = torch.randint(6, MASK, (3, 9), generator=torch.Generator().manual_seed(3))
LENGTHS = [9, 3, 4]
LENGTH = 8  # of each answer
RULES: dict[str, dict[str, Any]] = {
    "steps": {"steps": 4},
    "threshold": {"confidence_threshold": 0.3},
    "sampled": {"temperature": 0.7, "confidence_threshold": 0.2},
}


class ShiftedByHand(ByHand):
    """Position i predicts token i; the first token of a block comes from the block before."""

    def __call__(self, ids: Tensor, seen: Tensor | None = None) -> Tensor:
        logits = super().__call__(ids, seen)
        return torch.cat([logits[:1], logits[:-1]])


FAMILIES: dict[str, tuple[dict[str, Any], type[ByHand]]] = {
    "LLaDA2": (FIELDS, ByHand),
    "SDAR": (SDAR, ByHand),
    "SDAR with experts": (SDAR_MOE, ByHand),
    "Fast-dLLM v2": (FAST_DLLM, ShiftedByHand),
}


@pytest.fixture
def model(tmp_path: Path) -> Any:
    write_checkpoint(tmp_path, FIELDS)
    return load_backbone(str(tmp_path), dtype=torch.float64, experts_implementation="eager")[0]


def answers(model: Any, use_cache: bool | None, **settings: Any) -> Tensor:
    options = {"gen_length": LENGTH, "prompt_lengths": LENGTHS, "generator": torch.Generator().manual_seed(5)}
    sequences = generate(model, PROMPTS, use_cache=use_cache, **{**options, **settings})
    assert isinstance(sequences, Tensor)
    return sequences


def by_hand(logits: ByHand, prompt: list[int], gen_length: int, threshold: float) -> tuple[list[int], list[float]]:
    """The answer of the public greedy loop, and λ of the active block before each of its steps."""
    text, levels = prompt + [MASK] * gen_length, []
    for start in range(len(prompt) // B * B, len(text), B):
        places = [i for i in range(start, min(start + B, len(text))) if i >= len(prompt)]
        while masked := [i for i in places if text[i] == MASK]:
            levels.append(len(masked) / len(places))
            seen = torch.tensor(text[: places[-1] + 1])
            p = logits(seen, block_seen(len(seen), B))[masked]
            p[:, MASK] = -torch.inf
            best = p.softmax(-1).max(-1)
            order = best.values.argsort(descending=True).tolist()
            for rank, j in enumerate(order):
                if rank == 0 or best.values[j] > threshold:
                    text[masked[j]] = int(best.indices[j])
    return text[len(prompt) :], levels


@pytest.mark.parametrize("use_cache", [True, False])
@pytest.mark.parametrize("family", FAMILIES)
def test_answers_and_levels_match_the_manual_loop(family: str, use_cache: bool, tmp_path: Path) -> None:
    fields, hand = FAMILIES[family]
    logits, levels = hand(fields, write_checkpoint(tmp_path, fields)), []
    options: dict[str, Any] = {"experts_implementation": "eager"} if "num_experts" in fields else {}
    model, _ = load_backbone(str(tmp_path), dtype=torch.float64, **options)

    def keep(step: GenerationStep) -> None:
        levels.append(step.noise_level.tolist())

    how = {"confidence_threshold": 0.3, "stop_at_eos": False, "on_step_end": keep}
    actual = answers(model, use_cache, **how)
    for row, length in enumerate(LENGTHS):
        expected, of_row = by_hand(logits, PROMPTS[row, :length].tolist(), LENGTH, 0.3)
        assert actual[row, length : length + LENGTH].tolist() == expected
        assert [level[row] for level in levels if level[row] > 0] == pytest.approx(of_row)


@pytest.mark.parametrize("rule", RULES)
def test_cache_changes_no_token_of_the_base(model: Any, rule: str) -> None:
    """Where answers end early; whole ones: the test of an adapted model."""
    settings = RULES[rule] | {"eos_token_id": [END, 9, 10, 11, 12]}
    torch.testing.assert_close(answers(model, True, **settings), answers(model, False, **settings))


def test_cache_of_shifted_adapted_model_changes_no_token(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, FAST_DLLM)
    base, _ = load_backbone(str(tmp_path), dtype=torch.float64)
    adapted = nara(base, target_modules=["q_proj", "k_proj", "v_proj", "down_proj"])
    for settings in RULES.values():
        torch.testing.assert_close(answers(adapted, True, **settings), answers(adapted, False, **settings))


@pytest.mark.parametrize("rule", RULES)
def test_cache_changes_no_token_of_an_adapted_model(model: Any, rule: str) -> None:
    base = answers(model, True, **RULES[rule])
    targets = ["q_proj", "k_proj", "v_proj", "o_proj", "down_proj"]
    adapted = nara(model, target_modules=targets)
    cached = answers(adapted, True, **RULES[rule])
    torch.testing.assert_close(cached, answers(adapted, False, **RULES[rule]))
    assert not cached.equal(base)


def test_adapters_with_one_level_warn_and_keep_tokens(model: Any) -> None:
    base = answers(model, True)
    model = nara(model, target_modules=["q_proj", "down_proj"])
    model.add_adapter("still", nara_config(core_type="identity", r=3, target_modules=["v_proj"]))
    for config in model.peft_config.values():
        config.noise_level_per = "sample"
    for use_cache in (True, False):
        model.base_model.model.lora_core.finder._warned.clear()
        with pytest.warns(UserWarning, match="with one λ for each sample. This forward") as warned:
            actual = answers(model, use_cache)
        assert len(warned) == 1
    model.peft_config["default"].noise_level_per = "part"
    assert answers(model, True).equal(actual)
    model.peft_config["default"].noise_level_per = "sample"
    model.set_adapter("still")  # it has no λ
    answers(model, True)
    with model.disable_adapter():
        assert answers(model, True).equal(base)


def test_finished_text_isn_t_computed_again(model: Any) -> None:
    widths: list[int] = []
    model.model.embed_tokens.register_forward_hook(lambda _, args, __: widths.append(args[0].shape[1]))
    answers(model, True, steps=2, stop_at_eos=False)
    # blocks 0 (prompts of 3 and 4 tokens end in it) to 4 in one step each, which computes the finished block too
    assert widths == [4] + [8] * 4
    widths.clear()
    generate(model, PROMPTS, gen_length=4, steps=1)
    assert widths == [12, 8]  # the prompt's two whole blocks at once


def test_adapters_with_virtual_tokens_are_refused(model: Any) -> None:
    adapted = get_peft_model(model, PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4))
    with pytest.raises(ValueError, match="4 virtual tokens"):
        answers(adapted, True)


def test_settings_that_conflict_with_blocks_are_refused(model: Any) -> None:
    with pytest.raises(ValueError, match="blocks of 4"):
        answers(model, True, gen_length=12, block_length=6)
    with pytest.raises(ValueError, match="cfg_scale is"):
        answers(model, True, cfg_scale=1.0)
    with pytest.raises(ValueError, match="cache is 'dual'"):
        answers(model, None, cache="dual")
    with pytest.raises(ValueError, match="sees the masks of later blocks"):
        generate(backbone(VOCABULARY), PROMPTS, gen_length=12, use_cache=True)


def test_chat_takes_the_published_threshold(model: Any) -> None:
    assert Backbone(model).block_length == B
    forwards = []
    for settings in ({"chat": True}, {"confidence_threshold": 0.95}, {"chat": True, "steps": 3}):
        actual = generate(model, PROMPTS[:1], gen_length=12, stop_at_eos=False, return_stats=True, **settings)
        forwards.append((actual.forwards, actual.answers.tolist()))  # type: ignore[union-attr]
    assert forwards[0] == forwards[1] != forwards[2]


def test_chat_omits_threshold_for_orders_without_confidence(model: Any) -> None:
    options = {"gen_length": 12, "stop_at_eos": False, "return_stats": True, "remasking": "entropy"}
    actual = [generate(model, PROMPTS[:1], chat=chat, **options) for chat in (True, False)]
    assert actual[0].answers.equal(actual[1].answers)  # type: ignore[union-attr]
    assert actual[0].forwards == 12  # type: ignore[union-attr]
