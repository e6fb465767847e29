"""Training on all blocks of an answer in one pass: masks, each block's λ, the loss and its gradients."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from datasets import Dataset
from torch import Tensor, nn

from nara_diffusion import noise_level, register_core
from nara_diffusion.cores.registry import CUSTOM
from nara_diffusion.dllm import (
    AnswerCollator,
    load_backbone,
    log_likelihood,
    mask_answers,
    masked_diffusion_loss,
    noise_level_curve,
)
from nara_diffusion.dllm.kinds.block_kind import BLOCKS
from nara_diffusion.dllm.kinds.canvas_kind import CANVAS
from nara_diffusion.dllm.kinds.masked_kind import MASKED
from nara_diffusion.dllm.mask_draws import draw_noise_levels
from nara_diffusion.dllm.masking import MaskedBatch
from nara_diffusion.dllm.preference_loss import preference_loss
from nara_diffusion.dllm.text_arguments import Arguments
from nara_diffusion.dllm.text_report import Evaluation
from nara_diffusion.training.engines import recompute_activations
from tests.acceptance._text import nara
from tests.helpers.mixtures import LLADA2, MASK, SDAR_MOE, block_seen, write_checkpoint

B = 4
STARTS, SIZES = [5, 2, 8], [10, 9, 3]
IDS = torch.randint(6, MASK, (3, 15), generator=torch.Generator().manual_seed(0))
BATCH: dict[str, Any] = {"input_ids": IDS, "prompt_lengths": STARTS, "answer_lengths": SIZES, "seed": 4}


def tiny(folder: Path, published: dict[str, Any] = LLADA2, **fields: Any) -> Any:
    """A random LLaDA2, or another family, with experts, in float64."""
    write_checkpoint(folder, published | {"block_length": B})
    return load_backbone(str(folder), dtype=torch.float64, experts_implementation="eager", **fields)[0]


def row_of(row: int, ids: Tensor = IDS) -> dict[str, Any]:
    """The batch of one row, cut at its end."""
    end = STARTS[row] + SIZES[row]
    lengths = {"prompt_lengths": [STARTS[row]], "answer_lengths": [SIZES[row]]}
    return {"input_ids": ids[row : row + 1, :end], **lengths, "seed": 4, "sample_indices": [row], "group_size": 3}


def single_blocks(batch: MaskedBatch, row: int) -> Iterator[tuple[Tensor, int, int, float, Tensor]]:
    """Each block of an answer: tokens up to its end, its start, end and λ, and its part of the mask."""
    start, stop = STARTS[row], STARTS[row] + SIZES[row]
    first = (15 + B) // B * B - batch.targets.shape[1]  # the rows' longest text ends at 15
    for block in range(start // B, (stop - 1) // B + 1):
        begin, end = block * B, min(block * B + B, stop)
        masked = batch.masked[row, begin - first : end - first]
        noisy = IDS[row, begin:end].masked_fill(masked, MASK)
        levels = batch.noise_level[row].expand(batch.targets.shape[1] // B)
        level = float(levels[(begin - first) // B])
        yield torch.cat([IDS[row, :begin], noisy]), begin, end, level, masked


def reference(model: Any, batch: MaskedBatch, row: int) -> Tensor:
    """The loss of a row, by one pass for each of its blocks."""
    total = torch.zeros((), dtype=torch.float64)
    for ids, begin, end, level, masked in single_blocks(batch, row):
        levels = torch.zeros(1, begin // B + 1)
        levels[0, -1] = level
        padded = F.pad(ids, (0, begin + B - end))
        seen = block_seen(begin + B, B) & (torch.arange(begin + B) < end) | torch.eye(begin + B, dtype=torch.bool)
        with noise_level(model, levels):
            logits = model(padded[None], attention_mask=seen[None, None]).logits[0, begin:end]
        losses = F.cross_entropy(logits, IDS[row, begin:end], reduction="none")
        total = total + (losses * masked).sum() / np.float64(np.float32(level))
    return total / SIZES[row]


@pytest.mark.parametrize("one_level", [False, True])
def test_mask_answers_holds_noisy_then_clean_blocks(one_level: bool) -> None:
    batch = mask_answers(**BATCH, mask_token_id=MASK, block_length=B, one_level=one_level)
    n, width, first = 16, 16 + 12, 0  # row 1 has its first answer token in block 0, row 0 its last in block 3
    assert batch.targets.shape == (3, n)
    assert batch.input_ids.shape == (3, width)
    assert batch.position_ids is not None
    positions = [*range(first, 16), *range(12)]
    assert batch.position_ids.tolist() == [positions]
    levels = batch.forward_level
    assert levels.shape == (3, width // B)
    assert batch.attention_mask is not None
    for row, (start, size) in enumerate(zip(STARTS, SIZES, strict=True)):
        text = [*IDS[row].tolist(), 0]
        for place, position in enumerate(positions):
            is_noisy = place < n
            is_answer = start <= position < start + size
            masked = is_noisy and bool(batch.masked[row, place])
            assert not masked or is_answer
            assert batch.input_ids[row, place] == (MASK if masked else text[position])
            has_level = is_noisy and any(
                start <= p < start + size for p in range(position // B * B, position // B * B + B)
            )
            assert bool(levels[row, place // B] > 0) == has_level
            for key, other in enumerate(positions):
                same_block, earlier_block = position // B == other // B, position // B > other // B
                sees = (same_block and is_noisy == (key < n)) or (earlier_block and key >= n)
                expected = (sees and other < start + size) or key == place
                assert bool(batch.attention_mask[row, 0, place, key]) == expected
    assert batch.noise_level.shape == ((3,) if one_level else (3, 4))


def test_mask_answers_leaves_out_noisy_blocks_before_answers() -> None:
    late = {"input_ids": IDS, "prompt_lengths": [9, 13, 8], "answer_lengths": [6, 2, 3], "seed": 4}
    batch = mask_answers(**late, mask_token_id=MASK, block_length=B)
    assert batch.position_ids is not None
    assert batch.position_ids[0].tolist() == [*range(8, 16), *range(12)]
    assert batch.targets.equal(F.pad(IDS, (0, 1))[:, 8:])


def test_complementary_masks_cover_each_answer_token_once() -> None:
    batch = mask_answers(**BATCH, mask_token_id=MASK, block_length=B, complementary=True)
    first, second = batch.masked.chunk(2)
    assert (first ^ second).equal(batch.answer[:3])
    one, other = batch.forward_level.chunk(2)
    torch.testing.assert_close(one + other, (one > 0).float())
    assert torch.stack(batch.input_ids[:, 16:].chunk(2)).eq(IDS[:, :12]).all()
    assert batch.attention_mask is not None
    assert batch.attention_mask[:3].equal(batch.attention_mask[3:])


def test_block_levels_are_uniform_even_and_independent() -> None:
    """A block's λ depends on its place in its answer alone, and the first has that of a whole answer."""
    blocks = np.arange(8)[None].repeat(4000, 0)
    levels = draw_noise_levels(range(4000), 3, blocks=blocks)
    assert np.array_equal(levels[:, 0], draw_noise_levels(range(4000), 3))
    for of_block in levels.T:
        counts = np.histogram(of_block, bins=10, range=(0, 1))[0]
        assert (abs(counts - 400) < 5 * np.sqrt(400 * 0.9)).all()
    gaps = np.diff(np.sort(levels, 1), axis=1)
    assert gaps.max() < 0.25
    assert gaps.min() > 0.05
    together = mask_answers(**BATCH, mask_token_id=MASK, block_length=B)
    for row in range(3):
        alone = mask_answers(**row_of(row), mask_token_id=MASK, block_length=B)
        expected = alone.forward_level[alone.forward_level > 0]
        assert together.forward_level[row][together.forward_level[row] > 0].equal(expected)
        assert alone.input_ids[alone.masked.nonzero(as_tuple=True)].eq(MASK).all()
        assert int(alone.masked.sum()) == int(together.masked[row].sum())


@pytest.mark.parametrize(("use_dora", "chunk_size"), [(False, 3), (True, None)])
def test_loss_and_gradients_equal_sums_of_single_blocks(tmp_path: Path, use_dora: bool, chunk_size: int | None) -> None:
    """In float64, of all weights, experts and core included; for a batch, and for its rows by themselves."""
    targets = ["q_proj", "v_proj", "down_proj"]
    model = nara(tiny(tmp_path), target_modules=targets, use_dora=use_dora).double()
    for parameter in model.parameters():
        parameter.requires_grad_(parameter.is_floating_point())
    batch = masked_diffusion_loss(model, **BATCH, chunk_size=chunk_size)
    expected = torch.stack([reference(model, batch, row) for row in range(3)])
    torch.testing.assert_close(batch.per_sample, expected, rtol=1e-6, atol=1e-6)
    names = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    gradients = {}
    for source, losses in (("passes", [expected.mean()]), ("blocks", [batch.loss]), ("rows", None)):
        model.zero_grad()
        for loss in losses or (masked_diffusion_loss(model, **row_of(row)).loss / 3 for row in range(3)):
            loss.backward()
        gradients[source] = [model.get_parameter(name).grad for name in names]
    for source in ("blocks", "rows"):
        for name, ours, theirs in zip(names, gradients[source], gradients["passes"], strict=True):
            if theirs is None:
                assert ours is None or not ours.any(), name
            else:
                torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6, msg=name)
    experts = [i for i, name in enumerate(names) if ".experts." in name]
    assert experts
    assert all(gradients["blocks"][i].any() for i in experts)


def test_loss_of_a_block_ignores_all_later_blocks(tmp_path: Path) -> None:
    model = nara(tiny(tmp_path))
    row = row_of(0)
    first = masked_diffusion_loss(model, **row)
    ids = row["input_ids"].clone()
    ids[0, 12:] = (ids[0, 12:] - 5) % (MASK - 6) + 6
    second = masked_diffusion_loss(model, **row | {"input_ids": ids})
    shorter = masked_diffusion_loss(model, **row | {"input_ids": ids[:, :12], "answer_lengths": [7]})
    start = 12 - B  # the noisy half begins at position 4
    assert second.token_loss[0, :start].equal(first.token_loss[0, :start])
    torch.testing.assert_close(shorter.token_loss[0, :start], first.token_loss[0, :start], rtol=1e-6, atol=1e-6)
    assert not second.token_loss[0, start:].equal(first.token_loss[0, start:])
    assert first.token_loss[0, :start].any()


class ScalarCore(nn.Module):
    """C(λ) = λ I."""

    def __init__(self, config: Any, rank: int) -> None:
        super().__init__()
        self.rank = rank

    def forward(self, level: Tensor) -> Tensor:
        return level[:, None, None] * torch.eye(self.rank)


@pytest.mark.parametrize(
    ("published", "linear_layers", "recomputed"), [(LLADA2, 15, False), (LLADA2, 15, True), (SDAR_MOE, 9, False)]
)
def test_each_layer_sees_the_level_of_each_token(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, published: dict[str, Any], linear_layers: int, recomputed: bool
) -> None:
    """λ of a token is read from a layer's output, also when backward computes the layer again."""
    monkeypatch.delitem(CUSTOM, "scalar", raising=False)
    register_core("scalar", ScalarCore)
    base = tiny(tmp_path, published)
    if recomputed:
        recompute_activations(base)
    targets = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj", "lm_head"]
    model = nara(base, r=1, target_modules=targets, core_type="scalar").train()
    seen: dict[str, list[Tensor]] = {}

    def read(name: str, layer: Any) -> Any:
        @torch.no_grad()
        def hook(_: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
            x, weight = args[0].double(), layer.base_layer.weight
            product = layer.lora_B["default"].weight @ layer.lora_A["default"].weight * layer.scaling["default"]
            update = x @ product.T.double()
            change = output.double() - x @ weight.T
            seen.setdefault(name, []).append((change * update).sum(-1) / (update * update).sum(-1))

        return hook

    for name, layer in model.named_modules():
        if hasattr(layer, "lora_A") and hasattr(layer, "base_layer"):
            layer.register_forward_hook(read(name, layer))
    loss = masked_diffusion_loss(model, **BATCH)
    loss.loss.backward()
    expected = loss.forward_level.repeat_interleave(B, 1)
    assert len(expected.unique()) == 1 + 7  # seven blocks hold answers
    assert len(seen) == linear_layers
    assert (sum(map(len, seen.values())) > len(seen)) == recomputed
    for name, calls in seen.items():
        for levels in calls:
            torch.testing.assert_close(levels.view(expected.shape).float(), expected, rtol=0, atol=1e-4, msg=name)


ROWS: Any = Dataset.from_list(
    [
        {"input_ids": IDS[row, : start + size].tolist(), "prompt_length": start}
        for row, (start, size) in enumerate(zip(STARTS, SIZES, strict=True))
    ]
)


def test_curve_is_the_ratio_of_single_blocks(tmp_path: Path) -> None:
    model = nara(tiny(tmp_path))
    batch = masked_diffusion_loss(model, **BATCH, noise_level=0.6)
    losses = 0.6 * torch.stack([reference(model, batch, row) for row in range(3)]).sum()
    expected = losses / (batch.masked.sum(1) / torch.tensor(SIZES)).sum()
    (measured,) = noise_level_curve(model, ROWS, [0.6], seed=4, progress=False)
    assert measured == pytest.approx(expected.item(), rel=1e-6)


def test_validation_of_blocks_has_one_level_a_row(tmp_path: Path) -> None:
    """So that each row lies inside or outside of a window."""
    model = nara(tiny(tmp_path))
    args = Arguments(
        pretrained_model_name_or_path="none", train_file="none", eval_batch_size=2, seed=6, min_noise_level=0.3
    )
    accelerator = SimpleNamespace(device="cpu", num_processes=1, process_index=0, distributed_type="NO")
    run: Any = SimpleNamespace(args=args, accelerator=accelerator)
    base: Any = SimpleNamespace(kind=BLOCKS)
    data: Any = SimpleNamespace(validation_rows=ROWS, collator=AnswerCollator(0, trained_padding=0))
    evaluation = Evaluation(run, base, data)
    levels = torch.tensor(draw_noise_levels(range(3), 7, 3))
    options: dict[str, Any] = BATCH | {"seed": 7, "noise_level": levels}
    batch = masked_diffusion_loss(model, **options)
    losses = torch.stack([reference(model, batch, row) for row in range(3)]).detach()
    inside = levels >= 0.3
    assert evaluation.validate(model) == pytest.approx(
        {
            "validation_loss": float(losses.mean()),
            "validation_loss_inside": float(losses[inside].mean()),
            "validation_loss_outside": float(losses[~inside].mean()),
        },
        rel=1e-5,
    )


def test_preferences_equal_passes_of_single_blocks(tmp_path: Path) -> None:
    """A pair of rows 0 and 1. Each draw masks k of the n answer tokens of each block, which runs at k / n."""
    model, draws = nara(tiny(tmp_path)), 2
    options: dict[str, Any] = {"prompt_lengths": STARTS[:2], "answer_lengths": SIZES[:2], "seed": 4}
    first_level = torch.tensor([0.35, 0.35])
    indices = {"sample_indices": [7, 7], "noise_level": first_level}
    loss = preference_loss(model, IDS[:2], **options, **indices, draws=draws, beta=0.3)
    ratio = torch.zeros(2, dtype=torch.float64)
    for draw in range(draws):
        draw_options = {"sample_indices": [7 * draws + draw] * 2, "noise_level": first_level + draw / draws}
        masking = {"mask_token_id": MASK, "block_length": B, "counted": True}
        batch = mask_answers(IDS[:2], **options, **draw_options, **masking)
        masked, answer = (tensor.unflatten(1, (-1, B)).sum(2) for tensor in (batch.masked, batch.answer))
        levels = first_level[:, None] + draw / draws
        assert masked.equal((levels * answer).ceil().long())
        torch.testing.assert_close((batch.noise_level * answer).round().long(), masked)
        for row in range(2):
            gain = -reference(model, batch, row)
            with model.disable_adapter():
                gain = gain + reference(model, batch, row)
            ratio[row] += SIZES[row] * gain.detach() / draws
    expected = 0.3 * (ratio[0] - ratio[1])
    assert expected.abs() > 0.05
    torch.testing.assert_close(loss.margin.double(), expected[None], rtol=1e-4, atol=0)


def test_objective_dfactory_draws_one_level_of_its_window(tmp_path: Path) -> None:
    flags = Arguments(pretrained_model_name_or_path="none", train_file="none", objective="dfactory")
    many = {"input_ids": IDS[:1].repeat(40, 1), "prompt_lengths": [5] * 40, "seed": 1}
    batch = masked_diffusion_loss(tiny(tmp_path), **many, **BLOCKS.objective(flags))
    assert batch.noise_level.shape == (40,)
    assert 0.3 <= float(batch.noise_level.min()) < 0.32
    assert 0.78 < float(batch.noise_level.max()) < 0.8
    assert "window" not in BLOCKS.objective(replace(flags, max_noise_level=0.5))  # the run's own stays
    with pytest.raises(ValueError, match="leave one of them out"):
        BLOCKS.objective(replace(flags, complementary=True))
    for kind in (MASKED, CANVAS):
        with pytest.raises(ValueError, match="objective is dfactory"):
            kind.objective(flags)


def test_flat_loss_is_the_mean_of_masked_tokens(tmp_path: Path) -> None:
    loss = masked_diffusion_loss(tiny(tmp_path), **BATCH, flat=True, one_level=True)
    assert loss.noise_level.shape == (3,)
    for row in range(3):
        masked = loss.token_loss[row][loss.masked[row]]
        torch.testing.assert_close(loss.per_sample[row], masked.mean())
    torch.testing.assert_close(loss.loss, loss.per_sample.mean())


def test_likelihood_of_a_whole_text_is_refused(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, LLADA2)
    with pytest.raises(ValueError, match="block by block"):
        log_likelihood(load_backbone(str(tmp_path))[0], IDS, [5, 2, 8])
