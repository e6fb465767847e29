"""A `StrengthSchedule` multiplies the update of any LoRA by s(λ), a λ a sample, and is live.

Activation keeps it, a number multiplies it, files hold it: each rule is checked by whole outputs.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import inject_adapter_in_model
from torch import Tensor

from nara_diffusion import StrengthSchedule, TimestepNoise, noise_level, set_noise_source, set_strength
from pipelines.llada import LLaDAPipeline
from tests.acceptance import _lives
from tests.acceptance._by_hand import assert_near, disturb
from tests.acceptance._lives import frozen_sd, predict, save_lora
from tests.acceptance._twins import X, adapted, by_hand, lora_config, nara_config, run, two, with_second
from tests.helpers import adapted as tiny
from tests.helpers.rounding import assert_far

POINTS = [(0.1, 1.5), (0.4, -0.5), (0.8, 0.2)]
STEPS = [(0.25, 0.3), (0.25, 1.2), (0.7, 1.2), (0.7, 0.0)]
"""Below λ = .25 .3, from there 1.2, and from λ = .7 nothing."""
LEVELS = torch.tensor([0.33, 0.05, 0.93, 0.4, 0.7, 0.6])
INPUT = X.repeat(2, 1, 1) + torch.arange(6)[:, None, None] / 7
KINDS: dict[str, Any] = {
    "LoRA": lora_config(),
    "DoRA": lora_config(use_dora=True),
    "NaRA": nara_config(),
    "NaRA-DoRA": nara_config(use_dora=True),
}


def interpolated(levels: Tensor) -> Tensor:
    """POINTS by numpy, (b,) in float64."""
    places, values = zip(*POINTS, strict=True)
    return torch.from_numpy(np.interp(levels.double().numpy(), places, values))


def test_schedule_is_linear_between_points_with_exact_steps() -> None:
    levels = torch.linspace(0, 1, 101)
    torch.testing.assert_close(StrengthSchedule(POINTS)(levels).double(), interpolated(levels), rtol=0, atol=1e-6)
    actual = StrengthSchedule(STEPS)(torch.tensor([0.0, 0.249, 0.25, 0.5, 0.699, 0.7, 1.0]))
    torch.testing.assert_close(actual, torch.tensor([0.3, 0.3, 1.2, 1.2, 1.2, 0.0, 0.0]))


@pytest.mark.parametrize("kind", KINDS)
def test_each_sample_has_its_levels_strength(kind: str) -> None:
    model, default = adapted(KINDS[kind]), [["default"]] * 6
    formula = by_hand(model, default, LEVELS, x=INPUT)
    set_strength(model, "default", StrengthSchedule(POINTS))
    actual = run(model, LEVELS, INPUT)
    assert_near(actual, by_hand(model, default, LEVELS, {"default": interpolated(LEVELS)}, INPUT))
    assert_far(actual, formula)
    with pytest.raises(ValueError, match="noise_level"):
        model(INPUT)
    expected = by_hand(model, default, [0.25] * 6, {"default": [0.5] * 6}, INPUT)
    with noise_level(model, 0.25):
        merged: Any = model.merge_and_unload()
    with torch.no_grad():
        assert_near(merged(INPUT), expected)
        assert_far(merged(INPUT), two()(INPUT))


@pytest.mark.parametrize("kind", ["LoRA", "NaRA"])
def test_two_adapters_have_separate_schedules_and_zero_gradients(kind: str) -> None:
    model = adapted(KINDS[kind])
    if kind == "LoRA":
        model.add_adapter("other", lora_config(r=3, target_modules=["first"]))
        disturb(model, "other", seed=4)
    else:
        with_second(model)
    model.base_model.set_adapter(["default", "other"])
    set_strength(model, "default", StrengthSchedule(POINTS))
    set_strength(model, "other", StrengthSchedule(STEPS))
    strengths = {"default": interpolated(LEVELS), "other": torch.tensor([1.2, 0.3, 0.0, 1.2, 0.0, 1.2])}
    expected = by_hand(model, [["default", "other"]] * 6, LEVELS, strengths, INPUT)
    assert_near(run(model, LEVELS, INPUT), expected)
    model.set_adapter("other")
    for level, is_moved in ((0.8, False), (0.5, True)):
        model.zero_grad()
        with noise_level(model, level):
            model(INPUT).square().mean().backward()
        gradients = [
            0.0 if p.grad is None else float(p.grad.abs().max()) for p in model.parameters() if p.requires_grad
        ]
        assert [bool(gradient) for gradient in gradients] == [is_moved] * len(gradients)


def test_set_adapters_takes_schedules_beside_numbers_of_loras(tmp_path: Path) -> None:
    pipes: list[Any] = [frozen_sd() for _ in range(3)]
    first = save_lora(tmp_path)
    second = save_lora(tmp_path, seed=6, r=2, lora_alpha=2, target_modules=["to_k", "conv1"])
    for pipe in pipes:
        pipe.load_lora_weights(first, adapter_name="a")
        pipe.load_lora_weights(second, adapter_name="b")
    pipes[0].set_adapters(["a", "b"], [StrengthSchedule(POINTS), 0.6])
    for level, pipe in zip(_lives.LEVELS, pipes[1:], strict=True):
        pipe.set_adapters(["a", "b"], [float(interpolated(torch.tensor([level]))), 0.6])
    low, high = (predict(pipe) for pipe in pipes[1:])
    actual = predict(pipes[0])
    _lives.assert_near(actual, torch.stack([low[0], high[1], low[2]]), pipes[0].unet)
    assert_far(actual, torch.stack([high[0], low[1], high[2]]))


LLADA_TINY = Path(__file__).parents[2] / "examples" / "assets" / "llada-tiny"
SCHEDULE = StrengthSchedule([(0.2, 1.4), (0.5, 0.9), (0.5, -0.3), (0.9, 0.1)])
HALF = StrengthSchedule([(level, 0.5 * strength) for level, strength in SCHEDULE.points])
OTHER = StrengthSchedule([(0, 0.2), (1, 1.1)])
IDS = torch.randint(2, 40, (2, 9), generator=torch.Generator().manual_seed(1))

pytestmark = [
    pytest.mark.filterwarnings("ignore:Already found a `peft_config` attribute"),
    pytest.mark.filterwarnings("ignore:Adapter .* was active which is now deleted"),
]


class Loaded:
    """A pipeline with two adapters: "toy", a NaRA or a plain LoRA, which is active, and "style", a NaRA."""

    def __init__(self, kind: str, method: str) -> None:
        self.kind = kind
        self.pipe: Any = frozen_sd() if kind == "images" else LLaDAPipeline.from_pretrained(LLADA_TINY)
        self.model = self.pipe.unet if kind == "images" else self.pipe.transformer
        targets = ["to_q", "to_out.0"] if kind == "images" else ["q_proj", "v_proj"]
        config = tiny.nara_config if method == "NaRA" else tiny.lora_config
        torch.manual_seed(0)  # the frequencies
        inject_adapter_in_model(tiny.nara_config(target_modules=targets, r=3), self.model, "style")
        inject_adapter_in_model(config(target_modules=targets), self.model, "toy")
        tiny.disturb(self.model)
        self.pipe.set_adapters("toy")

    def output(self) -> Tensor:
        if self.kind == "images":
            return predict(self.pipe)
        with noise_level(self.model, [0.3, 0.7]), torch.no_grad():
            return self.model(IDS).logits

    def by_hand(self, schedule: StrengthSchedule | None) -> Tensor:
        """What it gives at that strength and no other number."""
        set_strength(self.model, "toy", None)
        if schedule is not None:
            set_strength(self.model, "toy", schedule)
        return self.output()


def assert_same(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5 * float(expected.abs().max()))


@pytest.mark.parametrize(("kind", "method"), [("images", "NaRA"), ("text", "LoRA")])
def test_live_schedule_stays_and_numbers_multiply_it(kind: str, method: str) -> None:
    one, other = Loaded(kind, method), Loaded(kind, method)
    live, half, new, plain = (other.by_hand(schedule) for schedule in (SCHEDULE, HALF, OTHER, None))
    assert not torch.allclose(live, half, rtol=1e-2, atol=1e-2 * float(live.abs().max()))
    for names, weights, expected in [
        ("toy", SCHEDULE, live),
        ("toy", 0.5, half),
        ("toy", None, live),
        (["toy"], [0.5], half),
        (["toy"], [None], live),
        (["style", "toy"], [0.0, 0.5], half),
        ("style", None, None),
        ("toy", None, live),
        (["style", "toy"], None, None),
        ("toy", 1.0, live),
        ("toy", 0.5, half),
        ("toy", OTHER, new),
    ]:
        one.pipe.set_adapters(names, weights)
        if expected is None:
            assert not torch.allclose(one.output(), live, rtol=1e-3, atol=1e-4)
        else:
            assert_same(one.output(), expected)
    one.pipe.disable_lora()
    one.pipe.enable_lora()
    assert_same(one.output(), new)
    set_strength(one.model, "toy", SCHEDULE)
    set_strength(one.model, "toy", 0.5)
    assert_same(one.output(), half)
    set_strength(one.model, "toy", None)
    assert_same(one.output(), plain)
    one.pipe.set_adapters("toy", 1.0)
    assert_same(one.output(), plain)


def test_file_holds_live_schedule_but_never_a_number(tmp_path: Path) -> None:
    one, again = Loaded("images", "NaRA"), Loaded("images", "NaRA")

    def reload(name: str) -> None:
        one.pipe.save_nara_weights(tmp_path / name, adapter_name="toy")
        again.pipe.load_nara_weights(tmp_path / name, adapter_name=name)
        again.pipe.set_adapters(name)

    one.pipe.set_adapters("toy", SCHEDULE)
    live = one.output()
    for number in (None, 0.5):
        one.pipe.set_adapters("toy", number)
        actual = one.output()
        reload(name := f"saved {number}".replace(".", " "))
        assert torch.equal(again.output(), live)
        again.pipe.set_adapters(name, number)
        assert torch.equal(again.output(), actual)
    plain = one.by_hand(None)
    reload("without")
    assert torch.equal(again.output(), plain)
    for saved, expected in (("saved None", live), ("without", plain)):
        again.pipe.set_adapters("toy")
        again.pipe.load_nara_weights(tmp_path / saved, adapter_name="toy", hotswap=True)
        assert torch.equal(again.output(), expected)  # before `set_adapters` reads the configuration
        again.pipe.set_adapters("toy")
        assert torch.equal(again.output(), expected)


@pytest.mark.parametrize("method", ["NaRA", "LoRA"])
def test_numbers_by_block_multiply_the_live_schedule(method: str) -> None:
    one, other = Loaded("images", method), Loaded("images", method)
    one.pipe.set_adapters("toy", SCHEDULE)
    one.pipe.set_adapters("toy", {"unet": {"mid": 0.5, "up": -0.2}})
    for level in (0.1, 0.7):
        live = float(SCHEDULE(level))
        other.pipe.set_adapters("toy", {"unet": {"down": live, "mid": 0.5 * live, "up": -0.2 * live}})
        with noise_level(one.model, level), noise_level(other.model, level):
            assert_same(one.output(), other.output())


# ---------------------------------------------------------------- refused, and deleted


def test_schedule_without_level_or_adapter_is_refused_first() -> None:
    pipe: Any = _lives.add_nara(frozen_sd(), "a")
    inject_adapter_in_model(tiny.lora_config(target_modules=["q_proj"]), pipe.text_encoder, "a")
    pipe.set_adapters("a", 0.7)
    original = predict(pipe)
    for weights, message in [
        (SCHEDULE, r"for text_encoder, which has no λ\. .*'text_encoder': 1\.0"),
        ({"unet": {"down": {"block_0": SCHEDULE}, "mid": 0.3}}, "for unet, .* a number for each block"),
    ]:
        with pytest.raises(ValueError, match=message):
            pipe.set_adapters("a", weights)
        assert torch.equal(predict(pipe), original)
    pipe.set_adapters("a", {"unet": SCHEDULE, "text_encoder": 1.0})
    assert not torch.allclose(predict(pipe), original)


@pytest.mark.parametrize(
    "options",
    [{"bias": "lora_only"}, {"lora_bias": True}, {"modules_to_save": ["second"]}, {"init_lora_weights": "pissa"}],
    ids=str,
)
def test_strength_of_lora_with_other_changes_is_refused(options: Any) -> None:
    model = adapted(lora_config(target_modules=["first"], **options))
    with pytest.raises(ValueError, match=f"would not scale what {next(iter(options))} changes in the model: pass"):
        set_strength(model, "default", SCHEDULE)
    set_strength(model, "default", 0.5)


def test_schedule_leaves_with_its_adapter() -> None:
    one, other = Loaded("images", "LoRA"), Loaded("images", "LoRA")
    one.pipe.set_adapters("toy", SCHEDULE)
    one.pipe.delete_adapters("toy")
    inject_adapter_in_model(tiny.lora_config(target_modules=["to_q", "to_out.0"]), one.model, "toy")
    tiny.disturb(one.model, "toy")
    one.pipe.set_adapters("toy")
    tiny.disturb(other.model, "toy")
    assert_same(one.output(), other.output())


def test_source_set_once_is_used_for_later_strengths() -> None:
    one = Loaded("images", "LoRA")
    one.pipe.delete_adapters("style")
    set_strength(one.model, "toy", OTHER)
    set_noise_source(one.model, TimestepNoise(num_train_timesteps=2000))
    expected = one.output()
    set_strength(one.model, "toy", None)
    set_strength(one.model, "toy", OTHER)
    assert torch.equal(one.output(), expected)


def test_schedule_is_refused_for_lora_with_padded_rank(tmp_path: Path) -> None:
    pipe: Any = frozen_sd()
    pipe.enable_lora_hotswap(target_rank=5)
    pipe.load_lora_weights(save_lora(tmp_path), adapter_name="toy")
    with pytest.raises(ValueError, match=r"layer '.*', since enable_lora_hotswap has made room there for rank 5: pass"):
        pipe.set_adapters("toy", SCHEDULE)
