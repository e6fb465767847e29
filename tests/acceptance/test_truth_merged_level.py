"""A model that is merged at one λ says so, once, when the source of λ tells another."""

from __future__ import annotations

import logging
import warnings
from typing import Any

import pytest
import torch
from peft import get_peft_model
from torch import Tensor

from nara_diffusion import noise_level, set_noise_source, set_strength
from nara_diffusion.dllm import read_noise_from_input_ids
from nara_diffusion.noise.level import NoiseSignals
from nara_diffusion.noise.strength_schedule import StrengthSchedule
from tests.acceptance._lives import add_nara, frozen_sd, predict
from tests.helpers.adapted import TwoLayers, adapted, disturb, lora_config

X = torch.randn(2, 7, generator=torch.Generator().manual_seed(0))


class Source:
    convention = "mine"

    def __init__(self, levels: Any) -> None:
        self.levels = levels

    def __call__(self, module: Any, args: Any, kwargs: Any) -> NoiseSignals:
        if self.levels is None:
            raise ValueError("λ can't be read")
        return NoiseSignals(torch.tensor(self.levels))


def run(model: Any) -> Tensor:
    with torch.no_grad():
        return model(X)


@pytest.mark.parametrize("kind", ["NaRA", "LoRA with a schedule"])
def test_a_source_that_tells_another_level_is_warned_of_once_a_merge(kind: str) -> None:
    if kind == "NaRA":
        model: Any = adapted(TwoLayers(), target_modules=["first"])
    else:
        model = get_peft_model(TwoLayers(), lora_config(target_modules=["first"])).eval()
        disturb(model)
        set_strength(model, "default", StrengthSchedule([(0, 1.0), (1, 0.2)]))
    with noise_level(model, 0.3):
        expected = run(model)
    source, said = Source(None), r"merged at noise_level 0\.3.* source tells \[0\.3, 0\.7.*unmerge_adapter"
    set_noise_source(model, source)
    for _ in range(2):
        with noise_level(model, 0.3):
            model.merge_adapter()
        for source.levels in (None, [0.3, 0.3]):  # a source that can't tell stops no merged model
            torch.testing.assert_close(run(model), expected)  # without a warning, which would be an error
        source.levels = [0.3, 0.7]
        with pytest.warns(UserWarning, match=said):
            torch.testing.assert_close(run(model), expected)
        run(model)  # said once
        model.unmerge_adapter()


def test_masks_of_a_text_are_such_a_source(tiny_llama: Any) -> None:
    model = adapted(tiny_llama, target_modules=["q_proj"])
    model.merge_adapter(noise_level=0.5)
    with read_noise_from_input_ids(model, 0), pytest.warns(UserWarning, match=r"source tells \[0\.25\]"):
        model(torch.tensor([[3, 4, 49, 5]]))


@pytest.mark.filterwarnings("ignore:Already unmerged")
def test_fusing_has_said_so_and_says_no_more(caplog: pytest.LogCaptureFixture) -> None:
    pipe = add_nara(frozen_sd())
    with noise_level(pipe.unet, 0.3), caplog.at_level(logging.WARNING):
        pipe.fuse_lora(components=["unet"])
    assert "is fused at noise_level 0.3: until unfuse_lora() every step" in caplog.text
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        predict(pipe)


def test_merged_adapter_that_is_disabled_runs_as_the_base_at_every_level() -> None:
    model = adapted(TwoLayers(), target_modules=["first", "second"])
    expected = model.base_model.model.first.base_layer(X)
    model.merge_adapter(noise_level=0.3)
    with model.disable_adapter(), noise_level(model, 0.9):
        run(model)
        torch.testing.assert_close(model.base_model.model.first(X), expected)
