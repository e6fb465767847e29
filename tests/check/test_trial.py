"""Short trainings beside each other, on a linear model of which it is known what they find."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from peft import LoraConfig, inject_adapter_in_model
from torch import Tensor, nn
from transformers import get_cosine_schedule_with_warmup

from nara_diffusion import core_matrix, noise_level
from nara_diffusion.check.run import decide, run_check
from nara_diffusion.check.trial import CheckSettings, restart, trials
from nara_diffusion.check.verdict import LIKELY, UNKNOWN, UNLIKELY
from nara_diffusion.training.base_hold import SplitLosses

from .linear_task import BATCH, D_IN, D_OUT, RANK, STEP, drawn, linear_loss, linear_task

SETTINGS = CheckSettings(steps=80, samples=100, repeats=4)
SHORT = CheckSettings(steps=4, samples=25, repeats=2)


def turning(levels: Tensor) -> Tensor:
    return 1 - 2 * levels


def test_decide_where_the_update_turns_with_the_level_finds_the_gain() -> None:
    """A static update can do nothing; C(λ) can turn the sign."""
    repeats, verdict = decide(linear_task(turning), SETTINGS, progress=False)
    assert verdict.answer == LIKELY
    assert "time layers" in verdict.reason  # the cheaper ways of telling λ, which it hasn't tried
    for repeat in repeats:
        assert repeat.losses["lora"].mean().item() == pytest.approx(repeat.losses["base"].mean().item(), rel=0.1)
        assert repeat.losses["nara"].mean() < 0.5 * min(repeat.losses["lora"].mean(), repeat.losses["untold"].mean())


def test_decide_where_a_static_update_leaves_the_same_rest_finds_no_gain(tmp_path, monkeypatch) -> None:
    """f is 1 at every λ, and the rest of the loss is what no update can learn. After so few steps a report leaves it
    open."""
    task = linear_task(torch.ones_like)

    def noisy(positions: Sequence[int]) -> Any:
        step = task.loss(positions)
        rest = torch.stack([drawn(seed=position + 10**7, uniform=True) for position in positions])
        return replace_losses(step, step.per_sample + 5 + rest)

    repeats, verdict = decide(replace(task, loss=noisy, held_out=noisy), SETTINGS, progress=False)
    assert verdict.answer == UNLIKELY
    assert len(repeats) == 3  # and no more are trained
    monkeypatch.setattr("nara_diffusion.check.run.decide", lambda *args: (repeats, verdict))
    content, shown = run_check(task, SETTINGS, tmp_path, {}, progress=False)
    assert content["verdict"] == UNKNOWN
    assert "80 steps are fewer than the 100" in content["reason"]
    assert f"{UNKNOWN}: {content['reason']}" in shown
    whole, _ = run_check(task, replace(SETTINGS, steps=100), tmp_path, {}, progress=False)
    assert (whole["verdict"], whole["reason"]) == (UNLIKELY, verdict.reason)


def replace_losses(step: Any, losses: Tensor) -> Any:
    step.per_sample, step.loss = losses, losses.mean()
    return step


def test_trials_lora_equals_a_lora_of_peft() -> None:
    """From the same A, on the same samples, by the same optimizer and schedule, clipped alike."""
    task = linear_task(turning, max_grad_norm=0.5)
    repeat = next(trials(task, SHORT, progress=False))
    restart(task, 0)
    plain = nn.Sequential(nn.Linear(D_IN, D_OUT, bias=False))
    plain[0].weight.data = drawn(D_OUT, D_IN, seed=1)
    inject_adapter_in_model(LoraConfig(r=RANK, lora_alpha=RANK, target_modules=["0"]), plain)
    plain[0].lora_A["default"].weight.data.copy_(task.model[0].lora_A["default"].weight)  # type: ignore[index]
    parameters = [parameter for parameter in plain.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=0.03, weight_decay=0)
    schedule = get_cosine_schedule_with_warmup(optimizer, 0, SHORT.steps)
    loss = linear_loss(plain, turning)
    for number in range(SHORT.steps):
        optimizer.zero_grad()
        loss(range(number * STEP, (number + 1) * STEP)).loss.backward()
        nn.utils.clip_grad_norm_(parameters, 0.5)
        optimizer.step()
        schedule.step()
    first = SHORT.repeats * SHORT.steps * STEP
    held_out = loss(range(first, first + 30))  # whole batches
    torch.testing.assert_close(repeat.losses["lora"].float(), held_out.per_sample.detach(), rtol=1e-4, atol=1e-6)
    assert torch.equal(repeat.noise_level, held_out.noise_level)


def test_trials_all_arms_meet_the_same_samples_and_repeats_meet_others() -> None:
    task = linear_task(turning)
    met: list[tuple[str, list[int]]] = []

    def noted(what: str) -> Any:
        def loss(positions: Sequence[int]) -> Any:
            met.append((what, list(positions)))
            return task.loss(positions)

        return loss

    list(trials(replace(task, loss=noted("trained"), held_out=noted("held out")), SHORT, progress=False))
    trained = [p for what, positions in met for p in positions if what == "trained"]
    held_out = [p for what, positions in met for p in positions if what == "held out"]
    each = SHORT.steps * STEP
    assert trained == [*range(each)] * 3 + [*range(each, 2 * each)] * 3
    first = 2 * each
    assert held_out == [*range(first, first + 30)] * 4 + [*range(first + 30, first + 60)] * 4
    assert all(len(positions) == BATCH for _, positions in met)


def test_trials_say_for_which_samples_the_base_is_held() -> None:
    """By the split of each chunk's losses, in the order of the samples."""
    task = linear_task(turning)

    def held_out(positions: Sequence[int]) -> Any:
        step = task.loss(positions)
        step.split = SplitLosses(step.per_sample, step.noise_level, step.noise_level > 0.6)
        return step

    first, second = trials(replace(task, held_out=held_out), SHORT, progress=False)
    for repeat in (first, second):
        assert repeat.held is not None
        assert torch.equal(repeat.held, repeat.noise_level > 0.6)
        assert 0 < repeat.held.sum() < len(repeat.held)
    assert next(trials(task, SHORT, progress=False)).held is None


def test_trials_each_repeat_starts_from_its_own_draw_and_repeats_it() -> None:
    task = linear_task(turning)
    starts = []
    for number in (0, 1, 0):
        for parameter in task.model.parameters():
            parameter.data = torch.full_like(parameter, 0.3) if parameter.requires_grad else parameter.data
        restart(task, number)
        starts.append({name: tensor.clone() for name, tensor in task.model.state_dict().items()})
        assert torch.equal(core_matrix(task.model, 0.7), torch.eye(RANK)[None])
        assert not starts[-1]["0.lora_B.default.weight"].any()
    first, second, again = starts
    assert all(torch.equal(first[name], again[name]) for name in first)
    differing = {name for name in first if not torch.equal(first[name], second[name])}
    assert "0.lora_A.default.weight" in differing
    assert any("frequencies" in name for name in differing)
    assert any("layers.0.weight" in name for name in differing)


def test_trials_lora_leaves_the_core_alone_and_nara_trains_it() -> None:
    task = linear_task(turning)
    seen: list[Tensor] = []

    def held_out(positions: Sequence[int]) -> Any:
        seen.append(core_matrix(task.model, 0.9).detach().clone())
        return task.loss(positions)

    list(trials(replace(task, held_out=held_out), replace(SHORT, samples=10, repeats=1), progress=False))
    base, lora, untold, nara = seen
    assert torch.equal(base, torch.eye(RANK)[None])
    assert torch.equal(lora, base)
    assert not torch.equal(nara, base)
    assert not torch.equal(untold, nara)
    assert all(parameter.requires_grad for name, parameter in task.model.named_parameters() if "nara_core" in name)


def test_trials_untold_equals_a_nara_whose_every_level_is_one_half() -> None:
    """The loss of a task whose λ is told by a source that says ½."""
    task, other = linear_task(turning), linear_task(turning)
    half = linear_loss(other.model, turning, lambda levels: noise_level(other.model, torch.full_like(levels, 0.5)))
    found = next(trials(task, SHORT, progress=False)).losses
    expected = next(trials(replace(other, loss=half, held_out=half), SHORT, progress=False)).losses
    torch.testing.assert_close(found["untold"], expected["nara"])
    assert not torch.allclose(found["untold"], found["nara"])


def test_trials_of_a_loss_that_is_not_finite_are_refused() -> None:
    with pytest.raises(ValueError, match="no longer a finite number: lower the learning rate"):
        list(trials(linear_task(lambda levels: levels / 0), SHORT, progress=False))
