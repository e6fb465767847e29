"""Masked language models: λ is the masked share of each sample's answer, in the loss, the sampler and the likelihoods.

The reference is a stock Llama in float64 whose weights are W0 + s·B·C(λ)·A, one sample at a time.
"""

from __future__ import annotations

from itertools import combinations
from math import comb
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from nara_diffusion.dllm import (
    generate,
    log_likelihood,
    masked_diffusion_loss,
    noise_level_curve,
    read_noise_from_input_ids,
)
from tests.helpers.rounding import rounding_of

from ._noise_models import Stock, adapt, assert_near, distance, run

MASK, PAD = 49, 0
IDS = torch.randint(2, MASK, (3, 14), generator=torch.Generator().manual_seed(0))
PROMPTS = [3, 6, 1]
ENDS = [14, 9, 12]
PADDING = (torch.arange(14) < torch.tensor(ENDS)[:, None]).long()
BATCH = {"input_ids": IDS, "prompt_lengths": PROMPTS, "attention_mask": PADDING}
UNKNOWN = r"λ is not known"


@pytest.fixture(scope="module")
def both() -> tuple[Any, Stock]:
    config = LlamaConfig(
        vocab_size=MASK + 1,
        hidden_size=24,
        intermediate_size=40,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        initializer_range=0.2,
        pad_token_id=PAD,
        use_cache=False,
    )
    config.is_causal, config.mask_token_id = False, MASK
    torch.manual_seed(3)
    llama = LlamaForCausalLM(config)
    llama.lm_head.weight.data *= 4  # some predictions are sure, others not
    model, stock = adapt(llama, ["q_proj", "v_proj", "down_proj"], scale=0.3)
    return model, stock.double()


@pytest.fixture
def model(both: tuple[Any, Stock]) -> Any:
    return both[0]


@pytest.fixture
def stock(both: tuple[Any, Stock]) -> Stock:
    return both[1]


def log_p(stock: Stock, ids: Tensor, level: float) -> Tensor:
    """log-probabilities (l, v) of one row (l,) without padding."""
    return run(stock.at(level), ids[None])[0].log_softmax(-1)


def losses_by_hand(stock: Stock, masked: Tensor, levels: Tensor, ids: Tensor = IDS) -> Tensor:
    """− log p (b, l) of the clean token where it is masked, zero elsewhere."""
    losses = torch.zeros(ids.shape, dtype=torch.float64)
    for row, end in enumerate(ENDS * (len(ids) // 3)):
        seen = ids[row].masked_fill(masked[row], MASK)[:end]
        found = log_p(stock, seen, float(levels[row])).gather(1, ids[row, :end, None])[:, 0]
        losses[row, :end] = -found * masked[row, :end]
    return losses


# ---------------------------------------------------------------------- the loss


@pytest.mark.parametrize(
    ("level", "options"),
    [
        (torch.tensor([0.9, 0.3, 0.6]), {}),
        (torch.tensor([0.4, 1.0, 0.7]), {"logits": "all"}),
        (None, {"complementary": True}),
    ],
    ids=["given", "all logits", "drawn, complementary"],
)
def test_loss_equals_the_formula_at_the_sampled_ratio_of_each_sample(
    model: Any, stock: Stock, level: Any, options: dict[str, Any]
) -> None:
    result = masked_diffusion_loss(
        model, **BATCH, noise_level=level, generator=torch.Generator().manual_seed(1), **options
    )
    times = 2 if "complementary" in options else 1
    lengths = torch.tensor([e - p for p, e in zip(PROMPTS, ENDS, strict=True)] * times).double()
    answer = (torch.arange(14) >= torch.tensor(PROMPTS)[:, None]) & PADDING.bool()
    assert not (result.masked & ~answer.repeat(times, 1)).any()
    if level is not None:
        torch.testing.assert_close(result.noise_level, level)
    share = result.masked.sum(1) / lengths
    assert len(result.noise_level.unique()) == 3 * times
    assert (share - result.noise_level).abs().max() > 0.01  # λ is the ratio that was drawn, not what came of it
    losses = losses_by_hand(stock, result.masked, result.noise_level, IDS.repeat(times, 1))
    per_sample = losses.sum(1) / result.noise_level.double() / lengths
    assert_near(result.per_sample, per_sample, model)
    assert_near(result.loss[None], per_sample.mean()[None], model)


def test_loss_of_answers_masked_whole_needs_no_draw(model: Any, stock: Stock) -> None:
    """The masks are given: all of each answer."""
    result = masked_diffusion_loss(model, **BATCH, noise_level=1.0)
    answer = (torch.arange(14) >= torch.tensor(PROMPTS)[:, None]) & PADDING.bool()
    assert torch.equal(result.masked, answer)
    means = losses_by_hand(stock, answer, torch.ones(3)).sum(1) / answer.sum(1)
    assert_near(result.loss[None], means.mean()[None], model)


# ---------------------------------------------------------------------- the sampler


def sample_by_hand(
    stock: Stock, prompt: Tensor, length: int, counts: list[int], block: int, scale: float, threshold: float | None
) -> tuple[Tensor, list[float], float]:
    """Greedy sampling of one row by confidence; → its answer, λ before each step, the closest of its decisions.

    `counts` has the tokens of each step within a block; with a `threshold`, all above it, at least one.
    """
    answer, levels, closest = torch.full((length,), MASK), [], 1.0
    start = len(prompt)
    for first in range(0, length, block):
        for step in range(block):
            masked = (answer == MASK).nonzero()[:, 0]
            inside = masked[(masked >= first) & (masked < first + block)]
            if len(inside) == 0 or (threshold is None and step >= len(counts)):
                break
            levels.append(len(masked) / length)
            logits = run(stock.at(levels[-1]), torch.cat([prompt, answer])[None])[0]
            if scale:
                blind = run(stock.at(levels[-1]), torch.cat([torch.full_like(prompt, MASK), answer])[None])[0]
                logits = blind + (1 + scale) * (logits - blind)
            logits[:, MASK] = -torch.inf
            p, tokens = logits[start:].softmax(-1).max(-1)
            order = p[inside].argsort(descending=True)
            if threshold is None:
                count = counts[step]
            else:
                count = max(1, int((p[inside] > threshold).sum()))
                closest = min(closest, float((p[inside] - threshold).abs().min()))
            top = logits[start:][inside].softmax(-1).topk(2).values
            closest = min(closest, float((top[:, 0] - top[:, 1]).min()))
            ranked = p[inside][order]
            if threshold is None and count < len(ranked):
                closest = min(closest, float(ranked[count - 1] - ranked[count]))
            answer[inside[order[:count]]] = tokens[inside[order[:count]]]
    return answer, levels, closest


@pytest.mark.parametrize(
    ("options", "counts"),
    [
        ({"block_length": 3, "steps": 4}, [2, 1]),
        ({"steps": 3, "cfg_scale": 1.5}, [2, 2, 2]),
        ({"confidence_threshold": 0.5}, []),
    ],
    ids=["blocks", "guidance", "rows of unequal λ"],
)
def test_generate_tells_each_row_the_masked_share_of_its_whole_answer(
    model: Any, stock: Stock, options: dict[str, Any], counts: list[int]
) -> None:
    told: list[Tensor] = []
    result = generate(
        model,
        IDS[:, :6],
        prompt_lengths=PROMPTS,
        gen_length=6,
        stop_at_eos=False,
        return_stats=True,
        on_step_end=lambda step: told.append(step.noise_level),
        **options,
    )
    block, scale = options.get("block_length", 6), options.get("cfg_scale", 0.0)
    for row, start in enumerate(PROMPTS):
        answer, levels, closest = sample_by_hand(
            stock, IDS[row, :start], 6, counts, block, scale, options.get("confidence_threshold")
        )
        assert closest > 10 * rounding_of(model)  # else rounding may decide
        assert result.answers[row].tolist() == answer.tolist()
        assert [float(level[row]) for level in told][: len(levels)] == pytest.approx(levels)
    if "confidence_threshold" in options:
        assert any(len(level.unique()) > 1 for level in told)


# ---------------------------------------------------------------------- likelihoods


def test_log_likelihood_of_short_answers_equals_the_sum_over_all_masks(model: Any, stock: Stock) -> None:
    prompts, ends = [3, 6], [6, 10]
    found = log_likelihood(model, IDS[:2], prompts, answer_lengths=[3, 4], samples=15, batch_size=4)
    expected = torch.zeros(2, dtype=torch.float64)
    for row, (start, end) in enumerate(zip(prompts, ends, strict=True)):
        n, ids = end - start, IDS[row, :end]
        for k in range(1, n + 1):
            for places in combinations(range(start, end), k):
                seen = ids.clone()
                seen[list(places)] = MASK
                one = log_p(stock, seen, k / n)[list(places), ids[list(places)]].sum()
                expected[row] += one * n / k / (n * comb(n, k))
    assert_near(found, expected, model)


def test_noise_level_curve_runs_each_of_its_levels_at_that_level(model: Any, stock: Stock) -> None:
    """With the masks that a loss at the same λ and seed draws."""
    rows = [{"input_ids": IDS[i, :end].tolist(), "prompt_length": PROMPTS[i]} for i, end in enumerate(ENDS)]
    levels = [1.0, 0.6, 0.2]
    curve = noise_level_curve(model, rows, levels, seed=5, progress=False)
    for level, found in zip(levels, curve, strict=True):
        masked = masked_diffusion_loss(model, **BATCH, noise_level=level, seed=5, sample_indices=[0, 1, 2]).masked
        lengths = torch.tensor([e - p for p, e in zip(PROMPTS, ENDS, strict=True)]).double()
        total = (losses_by_hand(stock, masked, torch.full((3,), level)).sum(1) / lengths).sum()
        expected = total / (masked.sum(1) / lengths).sum()
        assert_near(torch.tensor([found]), expected[None], model)


# ---------------------------------------------------------------------- another's sampler


def test_input_ids_tell_the_level_without_prompt_and_padding(model: Any, stock: Stock) -> None:
    masked = torch.zeros(3, 14, dtype=torch.bool)
    for row, columns in enumerate([[3, 4, 9], [6], [2, 3, 5, 8, 11]]):
        masked[row, columns] = True
    seen = IDS.masked_fill(masked, MASK)
    seen[1, 9:] = MASK  # padding, which a sampler may fill with anything
    blind = seen.clone()
    for row, start in enumerate(PROMPTS):
        blind[row, :start] = MASK  # as guidance does
    levels = [3 / 11, 1 / 3, 5 / 11]
    with read_noise_from_input_ids(model, prompt_lengths=PROMPTS, repeated="tiled"):
        output = run(model, torch.cat([seen, blind]), attention_mask=PADDING.repeat(2, 1))
    for half, ids in enumerate((seen, blind)):
        for row, end in enumerate(ENDS):
            expected = run(stock.at(levels[row]), ids[row, None, :end])
            assert_near(output[3 * half + row, None, :end], expected, model)
    with pytest.raises(ValueError, match=UNKNOWN):
        run(model, seen)


def test_level_off_by_a_hundredth_is_seen_by_the_comparison(model: Any, stock: Stock) -> None:
    right, wrong = (run(stock.at(level), IDS[:1]) for level in (0.5, 0.51))
    assert distance(wrong, right) > 4 * rounding_of(model)
