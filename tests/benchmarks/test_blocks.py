"""The evidence of block diffusion: what stands beside an adapter, its λ in `generate`, and the benchmark itself."""

from __future__ import annotations

import copy
from dataclasses import replace
from itertools import product

import benchmark_blocks
import pytest
import torch
from quality import results
from quality.blocks.bayes import bayes_losses, open_canvases
from quality.blocks.controls import SCALE, Control
from quality.blocks.runs import Arm, Prefixes, Run, Tuning, base_of, corrupted, task_of
from quality.blocks.truth import true_levels
from transformers import DynamicCache

from nara_diffusion.dllm.canvas_loss import block_model, decoder_inputs

BASE = "gemma-tiny"
RATES = {"learning_rate": 1e-2, "core_learning_rate": 1e-3}


def tuning(**arm) -> Tuning:
    return Tuning(Run(BASE, "case", Arm(**arm), 3, RATES, 2, 4))


def disturbed(model: torch.nn.Module) -> None:
    generator = torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += 0.1 * torch.randn(parameter.shape, generator=generator)


@pytest.mark.parametrize(("kind", "count"), [("bias", 10), ("constant", 1)])
def test_bias_is_added_to_the_seen_tokens_logit(kind, count):
    model, plain = copy.deepcopy(base_of(BASE)[0]), base_of(BASE)[0]
    control = Control(kind, model)
    control.numbers.data = torch.arange(1.0, count + 1)[:, None]
    control.level = torch.tensor([0.05, 0.35, 1.0])
    ids = {"input_ids": torch.randint(284, (3, 5)), "decoder_input_ids": torch.randint(284, (3, 16))}
    with torch.no_grad():
        added = model(**ids).logits - plain(**ids).logits
    numbers = torch.tensor([1.0, 4.0, 10.0] if count == 10 else [1.0, 1.0, 1.0])
    seen = torch.nn.functional.one_hot(ids["decoder_input_ids"], 284)
    torch.testing.assert_close(added, SCALE * numbers[:, None, None] * seen, atol=1e-4, rtol=1e-4)


def test_an_embedding_is_added_to_the_canvas_only():
    model, plain = copy.deepcopy(base_of(BASE)[0]), base_of(BASE)[0]
    control = Control("embedding", model)
    ids = {"input_ids": torch.randint(284, (2, 5)), "decoder_input_ids": torch.randint(284, (2, 16))}
    control.level = torch.tensor([0.2, 0.9])
    with torch.no_grad():
        same = model(**ids, cache=DynamicCache())
        torch.testing.assert_close(same.logits, plain(**ids).logits)
        control.numbers.data[9] = torch.linspace(-3, 3, 128)
        other = model(**ids, cache=DynamicCache())
    assert (other.logits - same.logits)[0].abs().max() == 0
    assert (other.logits - same.logits)[1].abs().max() > 0.1
    torch.testing.assert_close(other.encoder_last_hidden_state, same.encoder_last_hidden_state)


@pytest.mark.slow
def test_lambda_token_is_one_more_on_the_canvas():
    model, plain = copy.deepcopy(base_of(BASE)[0]), base_of(BASE)[0]
    control, seeing = Control("token", model), torch.randn(2, 17, 284)
    seeing[:, 16] = 0
    batch = corrupted(BASE, task_of(BASE, "open").train, torch.arange(2), seed=3, sample_indices=[0, 1])
    starts = (batch.starts + torch.tensor([0, -1])).tolist()  # unequal
    longer = torch.cat([batch.canvas, torch.tensor([[77], [99]])], 1)
    control.level = torch.tensor([0.25, 1.0])
    with torch.no_grad():
        control.numbers.data[[2, 9]] = plain.model.decoder.embed_tokens(longer[:, -1])
        inputs = decoder_inputs(model, replace(batch, starts=torch.tensor(starts)))
        actual = model(**inputs, self_conditioning_logits=seeing[:, :16], cache=DynamicCache()).logits
        for i, start in enumerate(starts):
            arguments = {"input_ids": batch.input_ids[i : i + 1, :start], "decoder_input_ids": longer[i : i + 1]}
            expected = plain(**arguments, self_conditioning_logits=seeing[i : i + 1], cache=DynamicCache()).logits[
                0, :16
            ]
            torch.testing.assert_close(actual[i], expected, rtol=1e-4, atol=1e-4)


def test_lambda_of_generate_is_the_unaccepted_share():
    model = copy.deepcopy(base_of(BASE)[0])
    control = Control("bias", model)
    control.numbers.data = torch.linspace(-0.2, 0.3, 10)[:, None]
    levels, masks = [], []
    embedding = control.own

    def noted(level):
        levels.append(level)
        masks.append(control.sampler.accepted_token_mask)
        return embedding(level)

    control.own = noted
    model.generate(torch.randint(284, (2, 7)), max_new_tokens=16, max_denoising_steps=4)
    assert len(levels) > 1
    assert levels[0].tolist() == [1.0, 1.0]
    for level, mask in zip(levels[1:], masks[1:], strict=True):
        torch.testing.assert_close(level, 1 - mask.float().mean(1))


@pytest.mark.slow
def test_true_levels_are_shares_of_wrong_tokens():
    tuned = tuning(core_type="identity", control="bias")
    inner, (_, tokenizer) = block_model(tuned.model.model), base_of(BASE)
    task = tuned.task.sampled
    rows = replace(task, rows=task.rows[:3], input_ids=task.input_ids[:3], prompt_lengths=task.prompt_lengths[:3])
    assert len(set(rows.prompt_lengths.tolist())) > 1
    order = sorted(range(3), key=lambda row: rows.rows[row]["prompt_length"])
    texts = [rows.rows[row]["answer"].swapcase() + "<|eot_id|>" for row in order]
    canvas = torch.full((3, rows.canvas), tokenizer.convert_tokens_to_ids("<|endoftext|>"))
    for line, text in zip(canvas, texts, strict=True):
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        line[: len(ids)] = torch.tensor(ids)
    wrong = torch.tensor([0, 3, rows.canvas])
    for line, count in zip(canvas, wrong.tolist(), strict=True):
        line[:count] = tokenizer.convert_tokens_to_ids("?")
    levels = []
    embedding = tuned.model.control.own
    tuned.model.control.own = lambda level: levels.append(level) or embedding(level)
    with true_levels(tuned.model, inner, rows, tokenizer), torch.no_grad():
        inner.forward(input_ids=torch.randint(284, (3, 5)), decoder_input_ids=canvas, cache=DynamicCache())
    torch.testing.assert_close(levels, [wrong / rows.canvas])


@pytest.mark.slow
def test_prefixes_are_what_the_frozen_encoder_computes():
    """The losses of a decoder that reads them are those of the package's own loss."""
    one = tuning(control="bias")
    disturbed(one.model)
    chosen = torch.tensor([0, 5, 9])
    key = {"seed": 2, "sample_indices": [0, 1, 2]}
    with torch.no_grad():
        actual = one.token_loss("held_out", chosen, 2, **key)
        one.arm = Arm(on_encoder=True)  # takes the package's loss; the encoder still has no adapter
        expected = one.token_loss("held_out", chosen, 2, **key)
    for a, b in zip(actual[:2], expected[:2], strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-4)


def test_bayes_is_the_posterior_over_all_clean_canvases():
    seen = open_canvases(2, 3, 5, count=7)
    grid = (torch.arange(200, dtype=torch.double) + 0.5) / 200
    for row in range(7):
        # z from what is known: a character that is right is 0, one that is wrong 1, another token 4
        z = [
            0 if same else (1 if is_known else 4)
            for same, is_known in zip(seen.same[row], seen.known[row], strict=True)
        ]
        joint = torch.zeros(3, 3, dtype=torch.double)
        for x in product(range(3), repeat=2):
            likelihood = torch.ones_like(grid)
            for place in range(2):
                likelihood = likelihood * ((1 - grid) * (x[place] == z[place]) + grid / 5)
            joint[x] = likelihood.sum()
        joint /= joint.sum()
        expected = torch.stack([-joint.sum(1)[0].log(), -joint.sum(0)[0].log()])
        torch.testing.assert_close(bayes_losses(seen, is_told=False)[row], expected)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arms", "counts"),
    [(["base"], (1, 1)), (["LoRA and e(λ)"], (4, 2)), (["NaRA", "NaRA on both twins"], (6, 4))],
)
@pytest.mark.usefixtures("committed")
def test_arms_are_run_once_and_measured(arms, counts, tmp_path):
    path = tmp_path / "blocks.jsonl"
    flags = ["--arms", *arms, "--steps", "2", "--output", str(path)]
    for task in ("open", "case", "open"):
        assert benchmark_blocks.main([*flags, "--tasks", task]) == 0
    records = results.read(path)
    assert tuple(sum(record["task"] == task for record in records) for task in ("open", "case")) == counts
    assert all(len(record["first"]) == len(record["second"]) == 10 for record in records)
    confirmed = [*flags, "--stage", "confirm", "--tasks", "case", "--seeds", "70"]
    assert benchmark_blocks.main(confirmed) == 0
    steps = ["4", "8", "16"]
    true = [] if arms == ["base"] else [f"{arm}, true λ" for arm in steps]
    assert list(results.read(path)[-1]["exact"]) == steps + true


@pytest.mark.usefixtures("committed")
def test_confirmation_needs_the_trials(tmp_path):
    flags = ["--arms", "LoRA", "--tasks", "open", "--output", str(tmp_path / "blocks.jsonl")]
    with pytest.raises(ValueError, match="lacks trials"):
        benchmark_blocks.main(["--stage", "confirm", *flags])


@pytest.mark.slow
def test_a_random_case_leaves_the_letters():
    task = task_of(BASE, "case")
    answers = [row["answer"] for row in task.train.rows]
    assert any(answer != answer.casefold() for answer in answers)
    assert len({tuple(row["input_ids"]) for row in task.held_out.rows}) == 256
    assert isinstance(Prefixes(BASE, task.sampled).length, int)
