"""nara-check: short trainings on a model whose answer is known, and the rules of the verdict."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import replace
from functools import cache
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from check.repeats import RepeatFile
from check.time_layers import time_layers
from check.trials import CHEAP, NO_CHEAP, CheckTask, Repeat, add_cheap, published, restart, trials
from check.verdict import LIKELY, UNKNOWN, UNLIKELY, bin_means, decide, differences, judge
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from transformers import get_cosine_schedule_with_warmup

from nara_diffusion import NaraConfig, core_matrix, noise_level
from nara_diffusion.dreambooth.denoiser import AdaptedDenoiser
from nara_flags.training import AdapterArguments, OptimizationArguments
from tests.helpers.pipelines.families import small_flux2_dev, small_qwen_image, small_wan_images, small_z_image
from tests.helpers.small_pipelines import small_flux, small_sd, small_sd3, small_sdxl

D_IN, D_OUT, RANK, BATCH, STEP = 7, 5, 3, 10, 20
SHORT = {"steps": 4, "samples": 25, "repeats": 2}
LONG = {"steps": 60, "samples": 50, "repeats": 4}


@cache  # the arms see the same samples
def drawn(*shape: int, seed: int, uniform: bool = False) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (torch.rand if uniform else torch.randn)(shape, generator=generator)


def linear_loss(model: nn.Module, needed: Callable[[Tensor], Tensor], rest: float = 0.0, tell: bool = True) -> Any:
    """y = W x is to become y = (W + f(λ) u vᵀ) x, from an x that doesn't show λ; `rest` can't be learnt."""
    weight, change = drawn(D_OUT, D_IN, seed=1), torch.outer(drawn(D_OUT, seed=2), drawn(D_IN, seed=3))

    def loss(positions: Sequence[int]) -> SimpleNamespace:
        x = torch.stack([drawn(3, D_IN, seed=position) for position in positions])  # (b, 3, d_in)
        levels = torch.stack([drawn(seed=position + 10**6, uniform=True) for position in positions])  # (b,)
        expected = x @ weight.T + needed(levels)[:, None, None] * (x @ change.T)
        with noise_level(model, levels) if tell else nullcontext():
            errors = (model(x) - expected).square().mean((1, 2)) + rest * (1 + levels)  # (b,)
        return SimpleNamespace(loss=errors.mean(), per_sample=errors, noise_level=levels, split=None)

    return loss


def linear_task(
    needed: Callable[[Tensor], Tensor], rest: float = 0.0, settings: dict[str, int] = SHORT, **rates: Any
) -> CheckTask:
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
    return CheckTask(model, config, args, loss, loss, STEP, **settings)


def turning(levels: Tensor) -> Tensor:
    return 1 - 2 * levels


@pytest.mark.slow
def test_decide_for_turning_update_is_likely():
    """A static update can do nothing; C(λ) can turn the sign."""
    repeats, verdict = decide(linear_task(turning, settings=LONG), progress=False)
    assert (verdict.answer, verdict.way) == (LIKELY, "nara")
    assert verdict.reason.endswith(f"{NO_CHEAP}.")
    for losses in (
        {name: losses_of_arm.mean().item() for name, losses_of_arm in repeat.losses.items()} for repeat in repeats
    ):
        assert losses["lora"] == pytest.approx(losses["base"], rel=0.1)
        assert losses["nara"] < 0.5 * min(losses["lora"], losses["untold"])


@pytest.mark.slow
def test_decide_for_static_update_is_unlikely_after_three():
    repeats, verdict = decide(linear_task(torch.ones_like, rest=5, settings=LONG), progress=False)
    assert (verdict.answer, len(repeats)) == (UNLIKELY, 3)


def test_trials_lora_equals_a_lora_of_peft():
    """From the same A, on the same samples, by the same optimizer and schedule, clipped alike."""
    task = linear_task(turning, max_grad_norm=0.5)
    repeat = next(trials(task, progress=False))
    restart(task, 0)
    assert torch.equal(core_matrix(task.model, 0.3)[0], torch.eye(RANK))
    plain = nn.Sequential(nn.Linear(D_IN, D_OUT, bias=False))
    plain[0].weight.data = drawn(D_OUT, D_IN, seed=1)
    inject_adapter_in_model(LoraConfig(r=RANK, lora_alpha=RANK, target_modules=["0"]), plain)
    plain[0].lora_A["default"].weight.data.copy_(task.model[0].lora_A["default"].weight)
    parameters = [parameter for parameter in plain.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=0.03, weight_decay=0)
    schedule = get_cosine_schedule_with_warmup(optimizer, 0, task.steps)
    loss = linear_loss(plain, turning, tell=False)
    for number in range(task.steps):
        optimizer.zero_grad()
        loss(range(number * STEP, (number + 1) * STEP)).loss.backward()
        nn.utils.clip_grad_norm_(parameters, 0.5)
        optimizer.step()
        schedule.step()
    first = task.repeats * task.steps * STEP
    with torch.no_grad():
        expected = loss(range(first, first + 30)).per_sample.double()
    torch.testing.assert_close(repeat.losses["lora"], expected, rtol=1e-5, atol=1e-7)


def test_decide_continues_after_the_repeats_of_the_file(tmp_path):
    """The further repeats are those of a check that wasn't stopped."""
    task = linear_task(turning, settings={"steps": 2, "samples": 10, "repeats": 3})
    complete, verdict = decide(task, progress=False, file=RepeatFile(tmp_path / "all.jsonl", {"base": "b"}))
    lines = (tmp_path / "all.jsonl").read_text().splitlines(keepends=True)
    assert len(lines) == len(complete) == 3
    (tmp_path / "part.jsonl").write_text(lines[0])
    file = RepeatFile(tmp_path / "part.jsonl", {"base": "b"})
    repeats, again = decide(task, progress=False, file=file)
    assert again == verdict
    assert (tmp_path / "part.jsonl").read_text() == "".join(lines)
    for one, other in zip(complete, repeats, strict=True):
        assert torch.equal(one.noise_level, other.noise_level)
        assert all(torch.equal(one.losses[arm], other.losses[arm]) for arm in one.losses)


def test_trials_refuses_a_loss_that_is_not_finite():
    with pytest.raises(ValueError, match="the loss is no longer a finite number: lower the learning rate"):
        next(trials(linear_task(lambda levels: levels / 0), progress=False))


@pytest.mark.slow
def test_token_trials_train_and_measure_their_own_losses():
    """`with_token` here is a task that a LoRA can learn; the other arms' it can't."""
    task = linear_task(turning, settings={"steps": 30, "samples": 50, "repeats": 1}, learning_rate=1e-3)
    add_cheap(task.model, task.config)
    easy = linear_loss(task.model, torch.ones_like)
    losses = next(trials(replace(task, with_token=(easy, easy)), progress=False)).losses
    assert list(losses) == ["base", "lora", "untold", "token", "nara"]
    assert losses["token"].mean() < 0.7 * min(losses["lora"].mean(), losses["base"].mean())


def test_cheap_lora_leaves_other_arms_unchanged():
    alone, beside = linear_task(turning), linear_task(turning)
    add_cheap(beside.model, beside.config)
    expected, actual = (next(trials(task, progress=False)).losses for task in (alone, beside))
    assert set(actual) - set(expected) == {"time"}
    for arm, losses in expected.items():
        assert torch.equal(actual[arm], losses), arm


TIME = {
    small_sd: {"time_embedding.linear_1", "time_embedding.linear_2", "mid_block.resnets.1.time_emb_proj"},
    small_sdxl: {"time_embedding.linear_1", "down_blocks.0.resnets.0.time_emb_proj"},
    small_sd3: {"time_text_embed.timestep_embedder.linear_2", "transformer_blocks.1.norm1_context.linear"},
    small_flux: {"single_transformer_blocks.0.norm.linear", "transformer_blocks.0.norm1.linear", "norm_out.linear"},
    small_flux2_dev: {"time_guidance_embed.timestep_embedder.linear_1", "double_stream_modulation_img.linear"},
    small_z_image: {"t_embedder.mlp.0", "layers.0.adaLN_modulation.0", "all_final_layer.2-1.adaLN_modulation.1"},
    small_qwen_image: {"time_text_embed.timestep_embedder.linear_1", "transformer_blocks.0.txt_mod.1"},
    small_wan_images: {"condition_embedder.time_embedder.linear_1", "condition_embedder.time_proj"},
}
OTHERS = ("text_embedder", "guidance_embedder", "context_embedder", "proj_out", "to_q", "proj_in", "ff", "mlp")


SLOW = [pytest.param(make, marks=pytest.mark.slow) for make in TIME if make not in (small_sdxl, small_flux)]


@pytest.mark.parametrize("make", [small_sdxl, small_flux, *SLOW], ids=lambda make: make.__name__)
def test_time_layers_get_a_lora_of_naras_size(make):
    pipe = make()
    config: Any = NaraConfig(r=RANK, lora_alpha=2 * RANK, target_modules=["to_q", "to_k"])
    model = AdaptedDenoiser(pipe, config)
    names = time_layers(model.denoiser)
    assert TIME[make] <= set(names)
    assert not [name for name in names for other in OTHERS if other in name.replace("t_embedder.mlp", "")]
    nara = trainable(model)
    add_cheap(model, config, names)
    restart(SimpleNamespace(model=model, config=config, args=SimpleNamespace(seed=0)), 0, CHEAP)
    layers = {name: layer for name, layer in model.denoiser.named_modules() if isinstance(layer, LoraLayer)}
    attention = {name for name in layers if name.endswith(("to_q", "to_k"))}
    assert {name for name, layer in layers.items() if CHEAP in layer.lora_A} == attention | set(names)
    assert {name for name, layer in layers.items() if "default" in layer.lora_A} == attention
    (rank,) = {layer.r[CHEAP] for layer in layers.values()}
    assert {layer.scaling[CHEAP] for layer in layers.values()} == {2}
    assert abs(trainable(model) - nara) <= trainable(model) / rank / 2 or rank == 1
    assert not [name for name, layer in model.named_parameters() if layer.requires_grad and CHEAP not in name]
    assert time_layers(model.denoiser) == []  # adapted already


def trainable(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)


LEVELS = torch.tensor([0.05, 0.95])


def repeats_of(**losses: Sequence[float]) -> list[Repeat]:
    """Repeats of these losses of each arm, alike at two noise levels; those of `base` and `lora` are 2 and 1."""
    losses = {"base": [2.0] * 3, "lora": [1.0] * 3, "untold": [1.0] * 3} | losses
    rows = (dict(zip(losses, row, strict=True)) for row in zip(*losses.values(), strict=True))
    return [Repeat(LEVELS, {arm: torch.full((2,), float(value)) for arm, value in row.items()}) for row in rows]


LOW, LEVEL, NOISY = [0.8, 0.81, 0.82], [1, 1.001, 0.999], [0.9, 1.1, 1.03]


def alike(loss: float) -> dict[str, list[float]]:
    """The loss of every arm that is trained."""
    return dict.fromkeys(("lora", "untold", "nara"), [loss] * 3)


@pytest.mark.parametrize(
    ("losses", "answer", "way", "reason"),
    [
        ({"nara": LOW}, LIKELY, "nara", "take NaRA. Held-out losses in 3 repeats: NaRA against LoRA −19.0 % ("),
        ({"nara": LOW, "time": LEVEL}, LIKELY, "nara", "take NaRA, which is better than LoRA + time layers too"),
        ({"nara": LOW, "token": [0.7, 0.7, 0.7]}, LIKELY, "token", "the cheapest way that gets it is LoRA + λ token"),
        ({"nara": LOW, "token": [0.7, 0.9, 1.1]}, LIKELY, None, "LoRA + λ token does isn't clear: try that first"),
        ({"nara": [0.99, 0.99, 0.991]}, UNKNOWN, None, "better, but not by −2.0 %: take LoRA, or train both"),
        ({"nara": LEVEL}, UNLIKELY, None, "take LoRA. Held-out"),
        ({"nara": LEVEL, "time": LOW}, UNLIKELY, None, "take a larger LoRA (LoRA + time layers is better, by its"),
        ({"nara": LOW, "untold": LOW}, UNLIKELY, None, "in 3 repeats"),  # a core that hastens without λ
        ({"nara": NOISY}, UNKNOWN, None, "NaRA isn't better than LoRA in the mean: take LoRA. Held"),
        ({"nara": LOW, "untold": [0.9, 0.7, 0.8]}, UNKNOWN, None, "isn't better than NaRA without λ in the mean"),
        ({"nara": [0.9, 1.05, 0.98]}, UNKNOWN, None, "no gain: take LoRA, or raise --train_batch_size"),
        (
            {"nara": [0.995, 0.99, 0.999]},
            UNKNOWN,
            None,
            "an interval excludes −2.0 %, but not a smaller gain: take LoRA",
        ),
        (alike(1.99), UNKNOWN, None, "−0.5 % from the base's: raise"),
        (alike(3), UNKNOWN, None, "+50.0 % from the base's: lower --learn"),
    ],
)
def test_judge_takes_the_first_rule_that_holds(losses, answer, way, reason):
    verdict = judge(repeats_of(**losses))
    assert (verdict.answer, verdict.way) == (answer, way)
    assert reason in verdict.reason
    assert (NO_CHEAP in verdict.reason) == (not {"time", "token"} & set(losses) and "from the base's" not in reason)


def test_differences_weight_bins_equally_and_compare_cheap_way():
    arms = {"lora": [1.0, 3.0, 0.01], "nara": [1.0, 1.0, 0.02], "time": [1.0, 1.0, 0.01], "untold": [1.0, 3.0, 0.04]}
    repeat = Repeat(torch.tensor([0.05, 0.06, 0.95]), {arm: torch.tensor(values) for arm, values in arms.items()})
    by_arm = {
        arm: {other: d.mean for other, d in by_other.items()} for arm, by_other in differences([repeat] * 2).items()
    }
    of_nara = {"lora": (-0.5 + 0.5) / 2, "untold": (-0.5 - 0.5) / 2, "time": (0 + 0.5) / 2}
    assert by_arm == {"nara": pytest.approx(of_nara), "time": pytest.approx({"lora": (-0.5 + 0) / 2})}
    means = bin_means([repeat])["lora"][0]
    assert [(n, round(mean, 6)) for n, mean in enumerate(means.tolist()) if mean == mean] == [(0, 2.0), (9, 0.01)]
