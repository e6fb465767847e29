"""The strength over λ that an adapter has is live: activation keeps it, a number multiplies it, files hold it.

Each rule is checked by whole outputs, in a pipeline for images and in one for text, of a NaRA and a plain LoRA.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from diffusers import StableDiffusionXLPipeline
from peft import inject_adapter_in_model
from torch import Tensor

from nara_diffusion import StrengthSchedule, noise_level, set_strength
from pipelines.llada import LLaDAPipeline
from tests.helpers.adapted import disturb, lora_config, nara_config

ASSETS = Path(__file__).parents[2] / "examples" / "assets"
POINTS = [(0.2, 1.4), (0.5, 0.9), (0.5, -0.3), (0.9, 0.1)]
SCHEDULE = StrengthSchedule(POINTS)
OTHER = StrengthSchedule([(0, 0.2), (1, 1.1)])
IDS = torch.randint(2, 40, (2, 9), generator=torch.Generator().manual_seed(1))

pytestmark = [
    pytest.mark.filterwarnings("ignore:Already found a `peft_config` attribute"),
    pytest.mark.filterwarnings("ignore:Adapter .* was active which is now deleted"),
]


def times(schedule: StrengthSchedule, number: float) -> StrengthSchedule:
    return StrengthSchedule([(level, number * strength) for level, strength in schedule.points])


class Kind(NamedTuple):
    """A pipeline without adapters, the component that is adapted, the layers, and what an adapter can change."""

    make: Callable[[], Any]
    component: str
    targets: list[str]
    output: Callable[[Any], Tensor]


def sdxl() -> Any:
    return StableDiffusionXLPipeline.from_pretrained(ASSETS / "sdxl-tiny")


def latents(pipe: Any) -> Tensor:
    pipe.set_progress_bar_config(disable=True)
    options = {"num_inference_steps": 4, "guidance_scale": 3.0, "output_type": "latent"}
    return pipe("a red car", generator=torch.Generator().manual_seed(2), **options).images


def logits(model: Any) -> Tensor:
    with noise_level(model, [0.3, 0.7]), torch.no_grad():
        return model(IDS).logits


KINDS = {
    "sdxl": Kind(sdxl, "unet", ["to_q", "to_out.0"], latents),
    "llada": Kind(
        lambda: LLaDAPipeline.from_pretrained(ASSETS / "llada-tiny"),
        "transformer",
        ["q_proj", "v_proj"],
        lambda pipe: logits(pipe.transformer),
    ),
}
EVERY = pytest.mark.parametrize("kind", KINDS)
PAIRS = pytest.mark.parametrize(
    ("kind", "method"), [("sdxl", "NaRA"), ("sdxl", "LoRA"), ("llada", "LoRA"), ("llada", "NaRA")]
)


class Loaded:
    """A pipeline with two adapters: "toy", a NaRA or a plain LoRA, and "style", a NaRA of another rank."""

    def __init__(self, kind: str, method: str, folder: Path) -> None:
        self.kind, self.folder = KINDS[kind], folder
        self.pipe = self.kind.make()
        self.model = getattr(self.pipe, self.kind.component)
        if not (folder / "style").exists():
            self._write()
        self.pipe.load_nara_weights(folder / "style", adapter_name="style")
        if method == "NaRA":
            self.pipe.load_nara_weights(folder / "toy", adapter_name="toy")
        else:
            inject_adapter_in_model(lora_config(target_modules=self.kind.targets), self.model, "toy")
            disturb(self.model, seed=5)
        self.pipe.set_adapters("toy")

    def _write(self) -> None:
        pipe = self.kind.make()
        for name, rank in (("toy", 4), ("style", 3)):
            config = nara_config(target_modules=self.kind.targets, r=rank)
            inject_adapter_in_model(config, getattr(pipe, self.kind.component), name)
        disturb(getattr(pipe, self.kind.component))
        for name in ("toy", "style"):
            pipe.save_nara_weights(self.folder / name, adapter_name=name)

    def output(self) -> Tensor:
        return self.kind.output(self.pipe)

    def by_hand(self, schedule: StrengthSchedule | None) -> Tensor:
        """What it gives at that strength and no other number."""
        set_strength(self.model, "toy", None)
        if schedule is not None:
            set_strength(self.model, "toy", schedule)
        return self.output()


@pytest.fixture
def load(tmp_path: Path) -> Callable[..., Loaded]:
    def loaded(kind: str, method: str) -> Loaded:
        return Loaded(kind, method, tmp_path)

    return loaded


def assert_near(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5 * float(expected.abs().max()))


@PAIRS
def test_a_number_multiplies_the_live_schedule_and_none_is_1(kind, method, load):
    one, other = load(kind, method), load(kind, method)
    live, half, plain = (other.by_hand(each) for each in (SCHEDULE, times(SCHEDULE, 0.5), None))
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


@PAIRS
def test_switching_away_and_back_keeps_the_live_schedule(kind, method, load):
    one = load(kind, method)
    one.pipe.set_adapters("toy", SCHEDULE)
    expected = one.output()
    for names in ("style", ["style", "toy"]):
        one.pipe.set_adapters(names)
        assert not torch.allclose(one.output(), expected, rtol=1e-3, atol=1e-4)
        one.pipe.set_adapters("toy")
        assert torch.equal(one.output(), expected)
    one.pipe.disable_lora()
    one.pipe.enable_lora()
    assert torch.equal(one.output(), expected)


@PAIRS
def test_a_new_schedule_replaces_the_live_one_and_its_number(kind, method, load):
    one = load(kind, method)
    expected = one.by_hand(OTHER)
    one.pipe.set_adapters("toy", SCHEDULE)
    one.pipe.set_adapters("toy", 0.5)
    one.pipe.set_adapters("toy", OTHER)
    assert_near(one.output(), expected)


@EVERY
def test_a_file_holds_the_live_schedule_and_never_a_number(kind, load, tmp_path: Path):
    one = load(kind, "NaRA")
    one.pipe.set_adapters("toy", SCHEDULE)
    live = one.output()
    for number in (None, 0.5, 1.0):
        one.pipe.set_adapters("toy", number)
        found = one.output()
        one.pipe.save_nara_weights(tmp_path / str(number), adapter_name="toy")
        again = load(kind, "NaRA")
        again.pipe.delete_adapters("toy")
        again.pipe.load_nara_weights(tmp_path / str(number), adapter_name="toy")
        again.pipe.set_adapters("toy")
        assert torch.equal(again.output(), live)
        again.pipe.set_adapters("toy", number)
        assert torch.equal(again.output(), found)
    plain = one.by_hand(None)
    one.pipe.save_nara_weights(tmp_path / "none", adapter_name="toy")
    one.pipe.delete_adapters("toy")
    one.pipe.load_nara_weights(tmp_path / "none", adapter_name="toy")
    one.pipe.set_adapters("toy")
    assert torch.equal(one.output(), plain)


def test_blocks_are_not_saved_which_saving_says(load, tmp_path: Path, caplog):
    one = load("sdxl", "NaRA")
    one.pipe.set_adapters("toy", {"unet": {"down": SCHEDULE}})
    one.pipe.save_nara_weights(tmp_path / "blocks", adapter_name="toy")
    assert "'toy' of unet has strengths over λ by block, which no file can hold" in caplog.text


def test_blocks_with_a_number_keep_their_schedule(load):
    one, other = load("sdxl", "LoRA"), load("sdxl", "LoRA")
    half = times(SCHEDULE, 0.5)
    other.pipe.set_adapters("toy", {"unet": {"down": half, "mid": OTHER, "up": SCHEDULE}})
    one.pipe.set_adapters("toy", SCHEDULE)
    one.pipe.set_adapters("toy", {"unet": {"down": 0.5, "mid": OTHER}})
    assert_near(one.output(), other.output())


def test_a_schedule_for_a_block_without_layers_is_refused_and_changes_nothing(load):
    one = load("sdxl", "LoRA")
    one.pipe.set_adapters("toy", 0.7)
    before = one.output()
    with pytest.raises(ValueError, match="adapts no layer"):
        one.pipe.set_adapters("toy", {"unet": {"down": {"block_0": SCHEDULE}, "mid": 0.3}})
    assert torch.equal(one.output(), before)
