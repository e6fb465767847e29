import pytest
import torch

from nara_diffusion.dllm.canvas_loss import CanvasBatch, corrupt_canvases
from nara_diffusion.dllm.mask_draws import draw_noise_levels

CANVAS, VOCABULARY = 5, 1000


def corrupted(prompts: list[int], answers: list[int], width: int, **options) -> CanvasBatch:
    ids = torch.arange(width).expand(len(prompts), -1) + 1000 * torch.arange(1, len(prompts) + 1)[:, None]
    key = {"seed": 7, "sample_indices": range(len(prompts)), "vocab_size": VOCABULARY, **options}
    lengths = {"prompt_lengths": torch.tensor(prompts), "answer_lengths": torch.tensor(answers)}
    return corrupt_canvases(ids, canvas_length=CANVAS, **{**lengths, **key})


def test_canvas_is_one_answer_block_with_clean_targets():
    batch = corrupted([3] * 64, [12] * 64, 15)
    assert set(batch.starts.tolist()) == {3, 8, 13}
    for row, start in enumerate(batch.starts.tolist()):
        inside = min(CANVAS, 15 - start)
        assert batch.supervised[row].tolist() == [True] * inside + [False] * (CANVAS - inside)
        assert torch.equal(batch.targets[row, :inside], batch.input_ids[row, start : start + inside])
        assert bool((batch.canvas[row, inside:] < VOCABULARY).all())  # noise, never a clean token


def test_share_lambda_of_canvas_becomes_uniform_tokens():
    n = 4000
    batch = corrupted([1] * n, [CANVAS] * n, 8, noise_level=torch.linspace(0.1, 0.9, n))
    changed = batch.canvas != batch.targets
    for part, level in ((changed[: n // 4], 0.2), (changed[-n // 4 :], 0.8)):
        assert part.float().mean().item() == pytest.approx(level, abs=0.03)
    tokens = batch.canvas[changed]
    assert tokens.min() >= 0
    assert tokens.max() < VOCABULARY
    assert tokens.float().mean().item() == pytest.approx((VOCABULARY - 1) / 2, rel=0.03)


def test_sample_has_same_corruption_in_any_batch():
    full = corrupted([2, 4, 3], [9, 7, 12], 20)
    alone = corrupt_canvases(
        full.input_ids[2:, :16],
        [3],
        answer_lengths=[12],
        canvas_length=CANVAS,
        vocab_size=VOCABULARY,
        seed=7,
        sample_indices=[2],
        group_size=3,
    )
    for name in ("starts", "canvas", "targets", "supervised", "noise_level", "self_conditioned"):
        assert torch.equal(getattr(alone, name), getattr(full, name)[2:]), name


def test_levels_match_masking_and_corruption_grows_with_them():
    batch = corrupted([2] * 8, [CANVAS] * 8, 9)
    assert batch.noise_level.tolist() == draw_noise_levels(range(8), 7, 8).tolist()
    low, high = (corrupted([2] * 8, [CANVAS] * 8, 9, noise_level=level) for level in (0.3, 0.7))
    changed = low.canvas != low.targets
    assert torch.equal(low.canvas[changed], high.canvas[changed])
    assert (high.canvas != high.targets).sum() > changed.sum()


def test_self_conditioned_samples_have_the_given_share():
    batch = corrupted([1] * 2000, [2] * 2000, 3, self_conditioning=0.3)
    assert batch.self_conditioned.float().mean().item() == pytest.approx(0.3, abs=0.04)
    assert corrupted([1] * 2000, [2] * 2000, 3).self_conditioned.float().mean().item() == pytest.approx(0.5, abs=0.04)
    assert corrupted([1], [2], 3, self_conditioning=0.0).self_conditioned is None


def test_noise_level_zero_raises():
    with pytest.raises(ValueError, match="noise_level"):
        corrupted([1], [2], 3, noise_level=0.0)
