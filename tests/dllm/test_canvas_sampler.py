"""`generate` on DiffusionGemma: its cache changes no logit and no token; its arguments."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from peft import get_peft_model
from torch import Tensor
from transformers import DynamicCache
from transformers.models.diffusion_gemma.generation_diffusion_gemma import (
    EntropyBoundSampler,
    EntropyBoundSamplerConfig,
    LinearTemperatureScheduleLogitsProcessor,
)

from nara_diffusion import NaraConfig, noise_level
from nara_diffusion.dllm import generate
from nara_diffusion.dllm.models.model_classes import CACHE
from nara_diffusion.dllm.sampler import answer_prompts
from tests.helpers.adapted import disturb
from tests.helpers.rounding import assert_far, assert_near
from tests.helpers.tiny_gemma import CANVAS, VOCABULARY, tiny_gemma

TWINS = r".*(encoder\.language_model|decoder)\.layers\..*(q_proj|k_proj|v_proj|o_proj|down_proj)"
PROMPTS = [[5, 9, 11, 30, 8, 12, 41], [7, 8, 40], [22, 1, 6, 60]]
CANVASES, STEPS = 3, 3


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
        rows, prefix, self.is_inside = [], torch.cat(self.prefix, 1), True
        for row, prompt in enumerate(PROMPTS):
            one = slice(row, row + 1)
            with noise_level(self.adapted, levels[one]):
                output_of_row = self.original(
                    input_ids=prefix[one, len(PROMPTS[0]) - len(prompt) :],
                    decoder_input_ids=given["decoder_input_ids"][one],
                    self_conditioning_logits=None if conditioning is None else conditioning[one],
                    **{CACHE: DynamicCache(config=self.inner.config.get_text_config())},
                )
            rows.append(output_of_row.logits)
        self.is_inside = False
        self.calls.append((output.logits, torch.cat(rows)))
        output.logits = self.calls[-1][1]
        return output


def adapted_gemma(base: Any = None, scale: float = 0.4) -> Any:
    config = NaraConfig(r=3, lora_alpha=7, target_modules=TWINS, core_scale=1.0)
    adapted = get_peft_model(tiny_gemma() if base is None else base, config).eval()
    disturb(adapted, seed=2, scale=scale)
    return adapted


def answers(adapted: Any, **settings: Any) -> Any:
    """With 3 steps a canvas: a random model makes much of small differences, in time."""
    settings = {"eos_token_id": [2], "gen_length": CANVASES * CANVAS, "steps": CANVASES * STEPS} | settings
    return answer_prompts(adapted, PROMPTS, generator=torch.Generator().manual_seed(3), **settings)


def test_cache_of_clean_canvases_changes_no_token(monkeypatch: pytest.MonkeyPatch) -> None:
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


# ---------------------------------------------------------------------- `generate`


def by_hand(adapted: Any, canvases: int, steps: int, bound: float) -> tuple[list[Tensor], list[Tensor]]:
    """The texts (1, l) of a plain loop that encodes the whole prefix of each row, without padding, at each call.

    Also λ (b,) of each call.
    """
    inner, used, texts = adapted.get_base_model(), [], [torch.tensor([prompt]) for prompt in PROMPTS]
    config = inner.config.get_text_config()
    shape = (len(PROMPTS), inner.config.canvas_length)
    for _ in range(canvases):
        canvas, levels, scores = torch.randint(0, config.vocab_size, shape), torch.ones(len(PROMPTS)), None
        for steps_left in range(steps, 0, -1):
            rows = []
            used.append(levels)
            for i, text in enumerate(texts):
                inputs = {
                    "input_ids": text,
                    "decoder_input_ids": canvas[i : i + 1],
                    CACHE: DynamicCache(config=config),
                }
                inputs |= {} if scores is None else {"self_conditioning_logits": scores[i : i + 1]}
                with noise_level(adapted, float(levels[i])):
                    rows.append(adapted(**inputs).logits)
            scores = torch.cat(rows) / (0.4 + 0.4 * steps_left / steps)
            drawn = scores.softmax(-1).flatten(0, 1).multinomial(1).view(shape)
            entropy, order = torch.special.entr(scores.softmax(-1)).sum(-1).sort()
            accepted = (entropy.cumsum(1) - entropy <= bound).gather(1, order.argsort())
            canvas = torch.where(accepted, drawn, torch.randint(0, config.vocab_size, shape))
            levels = 1 - accepted.float().mean(1)
        texts = [torch.cat([text, best[None]], 1) for text, best in zip(texts, scores.argmax(-1), strict=True)]
    return texts, used


def test_generate_matches_a_loop_without_cache() -> None:
    base = tiny_gemma()
    base.config.canvas_length = 16
    adapted = adapted_gemma(base, 0.1)
    config = adapted.get_base_model().generation_config
    config.sampler_config, config.confidence_threshold = EntropyBoundSamplerConfig(6.0), 1e-9  # no canvas ends early
    lengths = [len(prompt) for prompt in PROMPTS]
    width = max(lengths)
    on_the_right = torch.tensor([prompt + [0] * (width - len(prompt)) for prompt in PROMPTS])
    on_the_left = torch.tensor([[0] * (width - len(prompt)) + prompt for prompt in PROMPTS])
    torch.manual_seed(5)
    with torch.no_grad():
        expected, levels = by_hand(adapted, canvases=2, steps=3, bound=6.0)
    assert len(set(torch.cat(levels).tolist())) > 3
    for input_ids, padding in (
        (on_the_right, {"prompt_lengths": lengths}),
        (on_the_left, {"attention_mask": (on_the_left > 0).long()}),
    ):
        torch.manual_seed(5)
        options: dict[str, Any] = {"gen_length": 32, "steps": 6, "stop_at_eos": False, "return_stats": True}
        actual: Any = generate(adapted, input_ids, pad_token_id=3, **padding, **options)
        assert actual.forwards == len(levels) == 6
        assert actual.prompt_lengths.tolist() == lengths
        for row, text in enumerate(expected):
            padded = F.pad(text[0], (0, width + 32 - text.shape[1]), value=3)
            assert torch.equal(actual.sequences[row], padded)
            assert torch.equal(actual.answers[row], text[0, -32:])


def test_answer_ends_at_first_end_token_if_allowed() -> None:
    adapted, prompts = adapted_gemma(), torch.tensor([[5, 9, 11], [7, 8, 40]])

    def answers_of(**given: Any) -> Tensor:
        torch.manual_seed(1)
        actual: Any = generate(adapted, prompts, gen_length=2 * CANVAS, steps=4, pad_token_id=3, **given)
        return actual[:, 3:]

    full = answers_of(stop_at_eos=False)
    end = int(full[0, 2])
    places = [(row == end).nonzero()[0].item() if end in row else 2 * CANVAS for row in full]
    assert torch.equal(answers_of(eos_token_id=end, stop_at_eos=False), full)
    stopped = answers_of(eos_token_id=end)
    assert places[0] == 2
    for row, place, cut in zip(full, places, stopped, strict=True):
        assert torch.equal(cut[: place + 1], row[: place + 1])
        assert (cut[place + 1 :] == 3).all()


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"use_cache": False}, "use_cache can't be given for DiffusionGemma"),
        ({"mask_token_id": 3, "on_step_end": print}, "mask_token_id and on_step_end can't"),
        ({"gen_length": 21 * CANVAS}, "together 129, but the model has 128 positions"),
        ({"prompt_lengths": [3, 0]}, "a prompt is empty"),
        ({"cfg_scale": 1.0}, "cfg_scale is 1.0, but a model"),
        ({"cache": "dual"}, "cache is 'dual', but a model"),
    ],
)
def test_generate_refuses_options_that_diffusion_gemma_lacks(changes: Any, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        generate(tiny_gemma(), torch.tensor([[5, 9, 11], [7, 8, 40]]), **{"gen_length": CANVAS, **changes})


def test_generate_from_user_logits_raises() -> None:
    model = get_peft_model(tiny_gemma(), NaraConfig(r=2, target_modules=TWINS, core_scale=1.0)).get_base_model()
    prompts, options = torch.tensor(PROMPTS[1:2]), {"max_new_tokens": CANVAS, "max_denoising_steps": 2}
    for _ in range(2):  # also after another run
        with pytest.raises(ValueError, match="has not stepped since the last call"):
            model.generate(prompts, self_conditioning_logits=torch.zeros(1, CANVAS, VOCABULARY), **options)
        model.generate(prompts, **options)
