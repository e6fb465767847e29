"""nara-check: short trainings on a model whose answer is known, the rules of the verdict, and the command."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from peft import LoraConfig, inject_adapter_in_model
from torch import Tensor, nn
from transformers import get_cosine_schedule_with_warmup

from nara_diffusion import NaraConfig, core_matrix, noise_level
from nara_diffusion.check import Repeat, decide, judge, published, trials, verdict
from nara_diffusion.check.cli import main
from nara_diffusion.check.trials import CheckSettings, CheckTask, restart
from nara_diffusion.check.verdict import LIKELY, UNKNOWN, UNLIKELY, by_bins, relative_difference
from nara_diffusion.training.arguments import AdapterArguments, OptimizationArguments
from tests.helpers.small_pipelines import small_sdxl

ASSETS = Path(__file__).parents[2] / "examples" / "assets"
D_IN, D_OUT, RANK, BATCH, STEP = 7, 5, 3, 10, 20
SHORT = CheckSettings(steps=4, samples=25, repeats=2)


def drawn(*shape: int, seed: int, uniform: bool = False) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (torch.rand if uniform else torch.randn)(shape, generator=generator)


def linear_loss(model: nn.Module, needed: Callable[[Tensor], Tensor], rest: float = 0.0, tell: bool = True) -> Any:
    """y = W x is to become y = (W + f(λ) u vᵀ) x, from an x that doesn't show λ; `rest` can't be learnt."""
    weight, change = drawn(D_OUT, D_IN, seed=1), torch.outer(drawn(D_OUT, seed=2), drawn(D_IN, seed=3))

    def loss(positions: Sequence[int]) -> SimpleNamespace:
        x = torch.stack([drawn(3, D_IN, seed=position) for position in positions])  # (b, 3, d_in)
        levels = torch.stack([drawn(seed=position + 10**6, uniform=True) for position in positions])  # (b,)
        wanted = x @ weight.T + needed(levels)[:, None, None] * (x @ change.T)
        with noise_level(model, levels) if tell else nullcontext():
            errors = (model(x) - wanted).square().mean((1, 2)) + rest * (1 + levels)  # (b,)
        return SimpleNamespace(loss=errors.mean(), per_sample=errors, noise_level=levels, split=None)

    return loss


def linear_task(needed: Callable[[Tensor], Tensor], rest: float = 0.0, **rates: Any) -> CheckTask:
    model = nn.Sequential(nn.Linear(D_IN, D_OUT, bias=False)).requires_grad_(False)
    model[0].weight.data = drawn(D_OUT, D_IN, seed=1)
    config = NaraConfig(r=RANK, lora_alpha=RANK, target_modules=["0"])
    inject_adapter_in_model(config, model)
    loss = linear_loss(model, needed, rest)
    rates = {"learning_rate": 0.03, "core_learning_rate": 0.01, "max_grad_norm": None} | rates
    rates["train_batch_size"] = BATCH
    options = OptimizationArguments(**rates)
    adapter = AdapterArguments(adapter="lora", rank=RANK, target_modules=["0"])
    args = published(SimpleNamespace(**vars(adapter), **vars(options), seed=0))
    return CheckTask(model, config, args, loss, loss, STEP)


def turning(levels: Tensor) -> Tensor:
    return 1 - 2 * levels


def test_decide_of_an_update_that_turns_with_the_level_is_likely():
    """A static update can do nothing; C(λ) can turn the sign."""
    repeats, verdict = decide(linear_task(turning), CheckSettings(80, 100, 4), progress=False)
    assert verdict.answer == LIKELY
    for losses in ({name: each.mean().item() for name, each in repeat.losses.items()} for repeat in repeats):
        assert losses["lora"] == pytest.approx(losses["base"], rel=0.1)
        assert losses["nara"] < 0.5 * min(losses["lora"], losses["untold"])


def test_decide_of_a_static_update_is_unlikely_after_three_repeats():
    repeats, verdict = decide(linear_task(torch.ones_like, rest=5), CheckSettings(80, 100, 4), progress=False)
    assert (verdict.answer, len(repeats)) == (UNLIKELY, 3)


def test_trials_lora_equals_a_lora_of_peft():
    """From the same A, on the same samples, by the same optimizer and schedule, clipped alike."""
    task = linear_task(turning, max_grad_norm=0.5)
    repeat = next(trials(task, SHORT, progress=False))
    restart(task, 0)
    assert torch.equal(core_matrix(task.model, 0.3)[0], torch.eye(RANK))
    plain = nn.Sequential(nn.Linear(D_IN, D_OUT, bias=False))
    plain[0].weight.data = drawn(D_OUT, D_IN, seed=1)
    inject_adapter_in_model(LoraConfig(r=RANK, lora_alpha=RANK, target_modules=["0"]), plain)
    plain[0].lora_A["default"].weight.data.copy_(task.model[0].lora_A["default"].weight)
    parameters = [parameter for parameter in plain.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=0.03, weight_decay=0)
    schedule = get_cosine_schedule_with_warmup(optimizer, 0, SHORT.steps)
    loss = linear_loss(plain, turning, tell=False)
    for number in range(SHORT.steps):
        optimizer.zero_grad()
        loss(range(number * STEP, (number + 1) * STEP)).loss.backward()
        nn.utils.clip_grad_norm_(parameters, 0.5)
        optimizer.step()
        schedule.step()
    first = SHORT.repeats * SHORT.steps * STEP
    with torch.no_grad():
        expected = loss(range(first, first + 30)).per_sample.double()
    torch.testing.assert_close(repeat.losses["lora"], expected, rtol=1e-5, atol=1e-7)


def test_trials_refuses_a_loss_that_is_not_finite():
    with pytest.raises(ValueError, match="the loss is no longer a finite number: lower the learning rate"):
        next(trials(linear_task(lambda levels: levels / 0), SHORT, progress=False))


def repeats_of(nara: Sequence[float], untold: Sequence[float], lora: float = 1.0, base: float = 2.0) -> list[Repeat]:
    """A repeat for each NaRA's loss, alike at two noise levels."""
    levels = torch.tensor([0.05, 0.95])
    means = ({"base": base, "lora": lora, "untold": u, "nara": n} for n, u in zip(nara, untold, strict=True))
    return [Repeat(levels, {arm: torch.full((2,), float(value)) for arm, value in each.items()}) for each in means]


def test_judge_takes_the_first_rule_that_holds():
    for nara, untold, base, answer, reason in [
        ([0.8, 0.81, 0.82], [1, 1, 1], 2, LIKELY, "both means are −2.0 % or lower"),
        ([0.99, 0.99, 0.991], [1, 1, 1], 2, UNKNOWN, "take more steps"),
        ([1, 1.001, 0.999], [1, 1, 1], 2, UNLIKELY, "one interval is above −2.0 % and not below zero"),
        ([0.8, 0.81, 0.82], [0.8, 0.81, 0.82], 2, UNLIKELY, "in 3 repeats"),  # a core that hastens without λ
        ([0.9, 1.1, 1], [1, 1, 1], 2, UNKNOWN, "take more repeats"),
        ([0.8, 0.8, 0.8], [1, 1, 1], 0.81, UNKNOWN, "raise the learning rate or the steps"),
    ]:
        verdict = judge(repeats_of(nara, untold, base=base))
        assert verdict.answer == answer
        assert reason in verdict.reason


def test_relative_difference_counts_each_bin_alike():
    repeat = Repeat(
        torch.tensor([0.05, 0.06, 0.95]),
        {
            "base": torch.ones(3),
            "lora": torch.tensor([1.0, 3.0, 0.01]),
            "untold": torch.ones(3),
            "nara": torch.tensor([1.0, 1.0, 0.02]),
        },
    )
    assert relative_difference([repeat], "lora").mean == pytest.approx((-0.5 + 0.5) / 2)
    assert [(row.low, row.losses["lora"]) for row in by_bins([repeat])] == [(0.0, 2.0), (0.9, pytest.approx(0.01))]


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["images", "text"])
def test_command_writes_numbers_and_a_picture(kind, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(verdict, "CheckSettings", partial(CheckSettings, steps=2, samples=20, repeats=3))
    if kind == "images":
        small_sdxl().save_pretrained(tmp_path / "sdxl")
        words = [str(tmp_path / "sdxl"), str(ASSETS / "subject"), "--resolution", "16"]
    else:
        lines = (ASSETS / "two-step" / "validation.jsonl").read_text().splitlines()[:24]
        (tmp_path / "train.jsonl").write_text("\n".join(lines))
        words = [str(ASSETS / "llada-tiny"), str(tmp_path / "train.jsonl"), "--max_length", "60", "--gen_length", "12"]
        words += ["--target_modules", "q_proj"]
    main([*words, "--rank", "2", "--output_dir", str(tmp_path / "out")])
    found = json.loads((tmp_path / "out" / "check.json").read_text())
    assert (found["rank"], found["learning_rate"], found["core_learning_rate"]) == (2, 1e-2, 2.5e-3)
    assert 0 < found["losses"]["nara"] != found["losses"]["lora"] > 0
    assert f"{found['verdict']}: {found['reason']}" in capsys.readouterr().out
    assert (tmp_path / "out" / "check.png").read_bytes().startswith(b"\x89PNG")


def test_command_refuses_in_one_line(capsys):
    for words, message in [
        ([], "takes MODEL and DATA before its flags, got 0"),
        (["model", "nowhere"], "DATA nowhere doesn't exist"),
        (["model", str(ASSETS), "more"], "takes MODEL and DATA before its flags, got 3"),
        ([str(ASSETS / "llada-tiny"), __file__, "--rank", "0"], "rank must be at least 1, got 0"),
    ]:
        with pytest.raises(SystemExit) as stop:
            main(words)
        shown = stop.value.code if isinstance(stop.value.code, str) else capsys.readouterr().err.splitlines()[-1]
        assert message in shown
