"""A conversion at strength 0 leaves what the base predicts to the adapter's scheduler, and a warning says so."""

from __future__ import annotations

import logging
from typing import Any

import pytest

from nara_diffusion import StrengthSchedule, set_strength
from tests.helpers.small_pipelines import small_sdxl
from tests.loaders.adapters import trained
from tests.loaders.pipelines.converted import converted

pytestmark = pytest.mark.filterwarnings("ignore:Already found a `peft_config` attribute")

LATE = StrengthSchedule([(0.5, 1.0), (0.5, 0.0)])
MIDDLE = StrengthSchedule([(0.2, 1.0), (0.3, 0.0), (0.6, 0.0), (0.7, 1.0)])
NEVER = StrengthSchedule([(0, 0.0)])


def warnings_in(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if "strength 0" in record.getMessage()]


@pytest.mark.parametrize(
    ("weights", "where"),
    [
        (0.0, "at every noise level"),
        ({"unet": 0.0}, "at every noise level"),
        (NEVER, "at noise_level 0, 1"),
        (LATE, "at noise_level 0.5, 1"),
        (MIDDLE, "at noise_level 0.3, 0.6"),
    ],
)
def test_set_adapters_warns_once(weights: Any, where, flow, caplog):
    with caplog.at_level(logging.WARNING):
        flow.set_adapters("flow", weights)
        flow("a toy", num_inference_steps=2, height=16, width=16, output_type="latent")
    (message,) = warnings_in(caplog)
    assert f"Adapter 'flow' has strength 0 {where}," in message
    assert "where the model predicts what its base does, and not flow_prediction" in message
    assert "pipe.disable_lora()" in message


@pytest.mark.parametrize(
    ("blocks", "where"),
    [
        ({"down": 0.0, "mid": 0.0, "up": 0.0}, "at every noise level"),
        ({"down": MIDDLE, "mid": MIDDLE, "up": LATE}, "at noise_level 0.5, 0.6"),
    ],
)
def test_strengths_by_block_warn_where_all_of_them_are_0(blocks, where, caplog):
    pipe = converted("flow", target_modules=["to_q", "to_v"])  # none outside of the blocks that can have a weight
    with caplog.at_level(logging.WARNING):
        pipe.set_adapters("default", {"unet": blocks})
    (message,) = warnings_in(caplog)
    assert where in message


@pytest.mark.parametrize(
    "weights",
    [
        None,
        0.5,
        {"unet": {"down": 0.0, "mid": 0.5, "up": 0.0}},
        StrengthSchedule([(0, 1.0), (0.7, 0.3)]),
        StrengthSchedule([(0.5, -1.0), (0.5, 1.0)]),
        {"unet": {"down": LATE, "mid": 1.0, "up": LATE}},
    ],
)
def test_other_strengths_say_nothing(weights: Any, flow, caplog):
    with caplog.at_level(logging.WARNING):
        flow.set_adapters("flow", weights)
    assert warnings_in(caplog) == []


@pytest.mark.parametrize(("strength", "where"), [(0.0, "at every noise level"), (LATE, "at noise_level 0.5, 1")])
def test_set_strength_warns(strength, where, flow, caplog):
    with caplog.at_level(logging.WARNING):
        set_strength(flow.unet, "flow", strength)
    (message,) = warnings_in(caplog)
    assert where in message


@pytest.mark.parametrize("hotswap", [False, True])
def test_loading_warns_of_a_schedule_in_the_file(hotswap, folders, tmp_path, caplog):
    pipe = converted("flow")
    set_strength(pipe.unet, "default", LATE)
    pipe.save_nara_weights(tmp_path)
    other = small_sdxl()
    if hotswap:
        other.load_nara_weights(folders["flow"], "x")
    caplog.clear()
    with caplog.at_level(logging.WARNING):
        other.load_nara_weights(tmp_path, "x", hotswap=hotswap)
    (message,) = warnings_in(caplog)
    assert "Adapter 'x' has strength 0 at noise_level 0.5, 1," in message


def test_an_adapter_that_converts_nothing_may_have_any_strength(caplog):
    pipe = trained(text=False)
    with caplog.at_level(logging.WARNING):
        for weights in (0.0, LATE, NEVER):
            pipe.set_adapters("default", weights)
    assert warnings_in(caplog) == []
