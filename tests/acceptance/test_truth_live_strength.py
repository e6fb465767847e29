"""The strength over λ that an adapter has is live: activation keeps it, a number multiplies it, files hold it.

Each rule is checked by whole outputs, in a pipeline for images and in one for text, of a NaRA and a plain LoRA.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import inject_adapter_in_model
from torch import Tensor

from nara_diffusion import StrengthSchedule, noise_level, set_strength
from pipelines.llada import LLaDAPipeline
from tests.acceptance._lives import frozen_sd, predict
from tests.helpers.adapted import disturb, lora_config, nara_config

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
        config = nara_config if method == "NaRA" else lora_config
        torch.manual_seed(0)  # the frequencies
        inject_adapter_in_model(nara_config(target_modules=targets, r=3), self.model, "style")
        inject_adapter_in_model(config(target_modules=targets), self.model, "toy")
        disturb(self.model)
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


def assert_near(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5 * float(expected.abs().max()))


@pytest.mark.parametrize(("kind", "method"), [("images", "NaRA"), ("images", "LoRA"), ("text", "LoRA")])
def test_a_number_multiplies_the_live_schedule_and_none_is_1(kind: str, method: str) -> None:
    one, other = Loaded(kind, method), Loaded(kind, method)
    live, half, plain = (other.by_hand(each) for each in (SCHEDULE, HALF, None))
    assert not torch.allclose(live, half, rtol=1e-2, atol=1e-2 * float(live.abs().max()))
    one.pipe.set_adapters("toy", SCHEDULE)
    assert_near(one.output(), live)
    for names, weights, expected in [
        ("toy", 0.5, half),
        ("toy", None, live),
        (["toy"], [0.5], half),
        (["toy"], [None], live),
        (["style", "toy"], [0.0, 0.5], half),
        ("toy", 1.0, live),
    ]:
        one.pipe.set_adapters(names, weights)
        assert_near(one.output(), expected)
    set_strength(one.model, "toy", 0.5)
    assert_near(one.output(), half)
    set_strength(one.model, "toy", None)
    assert_near(one.output(), plain)
    one.pipe.set_adapters("toy", 1.0)
    assert_near(one.output(), plain)


@pytest.mark.parametrize(("kind", "method"), [("images", "LoRA"), ("text", "NaRA")])
def test_switching_away_and_back_keeps_the_live_schedule_and_a_new_one_replaces_it(kind: str, method: str) -> None:
    one, other = Loaded(kind, method), Loaded(kind, method)
    one.pipe.set_adapters("toy", SCHEDULE)
    live = one.output()
    for names in ("style", ["style", "toy"]):
        one.pipe.set_adapters(names)
        assert not torch.allclose(one.output(), live, rtol=1e-3, atol=1e-4)
        one.pipe.set_adapters("toy")
        assert torch.equal(one.output(), live)
    one.pipe.disable_lora()
    one.pipe.enable_lora()
    assert torch.equal(one.output(), live)
    one.pipe.set_adapters("toy", 0.5)
    one.pipe.set_adapters("toy", OTHER)
    assert_near(one.output(), other.by_hand(OTHER))


@pytest.mark.parametrize("kind", ["images", "text"])
def test_a_file_holds_the_live_schedule_and_never_a_number(kind: str, tmp_path: Path) -> None:
    one, again = Loaded(kind, "NaRA"), Loaded(kind, "NaRA")

    def reload(name: str) -> None:
        one.pipe.save_nara_weights(tmp_path / name, adapter_name="toy")
        again.pipe.load_nara_weights(tmp_path / name, adapter_name=name)
        again.pipe.set_adapters(name)

    one.pipe.set_adapters("toy", SCHEDULE)
    live = one.output()
    for number in (None, 0.5, 1.0):
        one.pipe.set_adapters("toy", number)
        found = one.output()
        reload(name := f"saved {number}".replace(".", " "))
        assert torch.equal(again.output(), live)
        again.pipe.set_adapters(name, number)
        assert torch.equal(again.output(), found)
    plain = one.by_hand(None)
    reload("without")
    assert torch.equal(again.output(), plain)


@pytest.mark.parametrize("method", ["NaRA", "LoRA"])
def test_numbers_by_block_multiply_the_live_schedule(method: str) -> None:
    one, other = Loaded("images", method), Loaded("images", method)
    one.pipe.set_adapters("toy", SCHEDULE)
    one.pipe.set_adapters("toy", {"unet": {"mid": 0.5, "up": -0.2}})
    for level in (0.1, 0.7):
        live = float(SCHEDULE(level))
        other.pipe.set_adapters("toy", {"unet": {"down": live, "mid": 0.5 * live, "up": -0.2 * live}})
        with noise_level(one.model, level), noise_level(other.model, level):
            assert_near(one.output(), other.output())


def test_a_schedule_for_a_block_is_refused_and_changes_nothing() -> None:
    one = Loaded("images", "LoRA")
    one.pipe.set_adapters("toy", 0.7)
    before = one.output()
    with pytest.raises(ValueError, match="for unet, of which each block has a number: a schedule is for an adapter"):
        one.pipe.set_adapters("toy", {"unet": {"down": {"block_0": SCHEDULE}, "mid": 0.3}})
    assert torch.equal(one.output(), before)
