"""An adapter that is loaded after `disable_lora` works in all layers; a load that fails leaves the others disabled."""

from __future__ import annotations

import pytest
import torch
from peft.tuners.tuners_utils import BaseTunerLayer

from nara_diffusion.loaders import insertion
from tests.helpers.adapted import nara_config
from tests.helpers.small_pipelines import pixels, small_sdxl
from tests.loaders.adapters import State, alone, predict

pytestmark = pytest.mark.filterwarnings("ignore:Already found a `peft_config` attribute")  # PEFT, at add_adapter

FOLDERS = ["nara_folder", "other_folder"]
"""The second adapts other layers than the first, and no text encoder."""


@pytest.fixture(params=[FOLDERS, FOLDERS[::-1]], ids=["nara, other", "other, nara"])
def folders(request):
    return [request.getfixturevalue(name) for name in request.param]


@pytest.fixture
def disabled(folders):
    pipe = small_sdxl()
    pipe.load_nara_weights(folders[0], "first")
    pipe.disable_lora()
    return pipe


def test_what_is_loaded_then_is_enabled_in_all_layers(disabled, folders):
    disabled.load_nara_weights(folders[1], "second")
    layers = [module for module in disabled.unet.modules() if isinstance(module, BaseTunerLayer)]
    assert {(*layer.active_adapters, layer.disable_adapters) for layer in layers} == {("second", False)}
    assert torch.equal(predict(disabled), predict(alone(folders[1])))
    assert torch.equal(pixels(disabled), pixels(alone(folders[1])))
    disabled.set_adapters("first")
    disabled.enable_lora()
    assert torch.equal(pixels(disabled), pixels(alone(folders[0])))


def test_a_load_that_fails_leaves_them_disabled(disabled, folders, base_pixels, monkeypatch):
    before = State(disabled)

    def fail(*args):
        raise MemoryError("none left")

    monkeypatch.setattr(insertion, "warn_where_off", fail)
    with pytest.raises(MemoryError):
        disabled.load_nara_weights(folders[1], "second")
    assert before == State(disabled)
    assert torch.equal(pixels(disabled), base_pixels)


def test_an_adapter_added_by_the_model_is_disabled_with_the_others(disabled, base_pixels):
    disabled.unet.add_adapter(nara_config(target_modules=["to_q", "to_k", "proj_in"]), "added")
    layers = [module for module in disabled.unet.modules() if isinstance(module, BaseTunerLayer)]
    assert all(layer.disable_adapters for layer in layers)
    assert torch.equal(pixels(disabled), base_pixels)
