"""DiffusionGemma's cache: every call of the decoder, over several canvases, against a forward from scratch."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from peft import get_peft_model
from transformers import DynamicCache
from transformers.models.diffusion_gemma.generation_diffusion_gemma import (
    EntropyBoundSampler,
    EntropyBoundSamplerConfig,
    LinearTemperatureScheduleLogitsProcessor,
)

from nara_diffusion import NaraConfig, noise_level
from nara_diffusion.dllm.canvas_sampler import answer_canvases
from tests.helpers.adapted import disturb
from tests.helpers.rounding import assert_far, assert_near
from tests.helpers.tiny_gemma import CANVAS, tiny_gemma

TWINS = r".*(encoder\.language_model|decoder)\.layers\..*(q_proj|k_proj|v_proj|o_proj|down_proj)"
PROMPTS = [[5, 9, 11, 30, 8, 12, 41], [7, 8, 40], [22, 1, 6, 60]]
CANVASES, STEPS = 3, 4


class FromScratch:
    """Replaces the forward of a model: it encodes the whole clean prefix of each row, without padding, for each call.

    λ is computed here: 1 at a canvas' first call, then the share that the sampler's last step did not accept.

    Attributes:
        calls: (logits with the cache, logits without it), one pair a call of the decoder.
        levels: λ (b,) of each call.
    """

    def __init__(self, adapted: Any, monkeypatch: pytest.MonkeyPatch) -> None:
        self.adapted, self.inner = adapted, adapted.get_base_model()
        self.original, self.prefix, self.is_inside = self.inner.forward, [], False
        self.calls: list[Any] = []
        self.levels: list[torch.Tensor] = []
        self.left = torch.ones(len(PROMPTS))
        accept = EntropyBoundSampler.accept_canvas

        def accepting(sampler: Any, *args: Any) -> torch.Tensor:
            canvas = accept(sampler, *args)
            self.left = 1 - sampler.accepted_token_mask.float().mean(1)
            return canvas

        monkeypatch.setattr(EntropyBoundSampler, "accept_canvas", accepting)
        monkeypatch.setattr(self.inner, "forward", self.forward)
        self.inner.model.encoder.register_forward_pre_hook(self.encoding, with_kwargs=True)

    def encoding(self, encoder: Any, args: tuple, kwargs: dict[str, Any]) -> None:
        if not self.is_inside:
            self.prefix.append(kwargs["input_ids"])

    def forward(self, **given: Any) -> Any:
        output = self.original(**given)
        conditioning = given["self_conditioning_logits"]
        levels = torch.ones(len(PROMPTS)) if conditioning is None else self.left
        self.levels.append(levels)
        rows, whole, self.is_inside = [], torch.cat(self.prefix, 1), True
        for row, prompt in enumerate(PROMPTS):
            one = slice(row, row + 1)
            with noise_level(self.adapted, levels[one]):
                output_of_row = self.original(
                    input_ids=whole[one, len(PROMPTS[0]) - len(prompt) :],
                    decoder_input_ids=given["decoder_input_ids"][one],
                    self_conditioning_logits=None if conditioning is None else conditioning[one],
                    cache=DynamicCache(config=self.inner.config.get_text_config()),
                )
            rows.append(output_of_row.logits)
        self.is_inside = False
        self.calls.append((output.logits, torch.cat(rows)))
        output.logits = self.calls[-1][1]
        return output


def adapted_gemma() -> Any:
    adapted = get_peft_model(tiny_gemma(), NaraConfig(r=3, lora_alpha=7, target_modules=TWINS, core_scale=1.0)).eval()
    disturb(adapted, seed=2)
    return adapted


def answers(adapted: Any, **settings: Any) -> Any:
    """With 4 steps a canvas: a random model makes much of small differences, in time."""
    settings = {"eos_token_id": [2], "gen_length": CANVASES * CANVAS, "steps": CANVASES * STEPS} | settings
    return answer_canvases(adapted, PROMPTS, generator=torch.Generator().manual_seed(3), **settings)


def test_the_cache_of_clean_canvases_changes_no_logit_and_no_token(monkeypatch: pytest.MonkeyPatch) -> None:
    adapted = adapted_gemma()
    adapted.get_base_model().generation_config.sampler_config = EntropyBoundSamplerConfig(entropy_bound=2.0)
    cached = answers(adapted)
    scratch = FromScratch(adapted, monkeypatch)
    uncached = answers(adapted)
    assert torch.equal(cached.sequences, uncached.sequences)
    assert cached.forwards == len(scratch.calls) == CANVASES * STEPS
    assert len(scratch.prefix) == CANVASES
    assert len({tuple(level.tolist()) for level in scratch.levels}) > 3
    for with_cache, without in scratch.calls:
        assert_near(with_cache, without, adapted, 3)
    assert_far(scratch.calls[0][1], scratch.calls[-1][1])


def test_temperature_is_that_of_all_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    adapted, scaled = adapted_gemma(), []
    schedule = LinearTemperatureScheduleLogitsProcessor.__call__

    def recorded(processor: Any, ids: torch.Tensor, scores: torch.Tensor, cur_step: int) -> torch.Tensor:
        scaled.append((schedule(processor, ids, scores, cur_step), scores))
        return scaled[-1][0]

    monkeypatch.setattr(LinearTemperatureScheduleLogitsProcessor, "__call__", recorded)
    answers(adapted, temperature=0.3)
    assert len(scaled) == CANVASES * STEPS
    for divided, scores in scaled:
        torch.testing.assert_close(divided, scores / 0.3)
