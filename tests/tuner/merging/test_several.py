"""Several adapters merge together or one after the other, and one of them without the others."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from nara_diffusion import noise_level
from tests.helpers.adapted import OneLayer, TwoLayers, adapted, disturb, nara_config
from tests.tuner.merging.merged import tensors_of_base, unmerged_output

pytestmark = pytest.mark.filterwarnings(
    "ignore:Already following adapters were merged"
)  # PEFT tells of each further one


def three_adapters(use_dora: bool = False) -> Any:
    """ "default" and "other" depend on λ, "plain" is a LoRA; the second has another rank, η and set of layers."""
    model = adapted(TwoLayers(), target_modules=["first", "second"], use_dora=use_dora)
    model.add_adapter("other", nara_config(r=2, core_scale=0.3, target_modules=["first"], use_dora=use_dora))
    model.add_adapter("plain", nara_config(r=3, target_modules=["second"], core_type="identity"))
    disturb(model, seed=4)
    return model.eval()


@pytest.mark.parametrize("use_dora", [False, True], ids=["NaRA", "NaRA-DoRA"])
@pytest.mark.parametrize("names", [["default", "other"], ["other", "plain"], ["default", "other", "plain"]])
def test_active_adapters_merge_together(names, use_dora):
    model = three_adapters()
    model.base_model.set_adapter(names)
    x = torch.randn(3, 7)
    expected = unmerged_output(model, x, 0.35)
    before = tensors_of_base(model)
    model.merge_adapter(noise_level=0.35)
    torch.testing.assert_close(model(x), expected, rtol=1e-5, atol=1e-5)
    model.unmerge_adapter()
    for name, tensor in tensors_of_base(model).items():
        torch.testing.assert_close(tensor, before[name], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("first", ["default", "plain", "other"])
def test_adapters_merge_one_after_the_other(first):
    model = three_adapters()
    names = ["default", "other", "plain"]
    model.base_model.set_adapter(names)
    x = torch.randn(3, 7)
    expected = unmerged_output(model, x, 0.35)
    names.remove(first)
    model.merge_adapter([first], noise_level=None if first == "plain" else 0.35)
    for name in names:
        model.merge_adapter([name], noise_level=None if name == "plain" else 0.35)
    torch.testing.assert_close(model(x), expected, rtol=1e-5, atol=1e-5)
    with noise_level(model, 0.5), pytest.raises(ValueError, match=r"merged at noise_level 0\.35"):
        model(x)


def test_dora_adapters_that_merge_one_after_the_other_see_the_unmerged_weight():
    model = adapted(OneLayer(nn.Linear(7, 5)), target_modules=["layer"])
    model.add_adapter("dora", nara_config(target_modules=["layer"], use_dora=True))
    disturb(model, seed=4)
    model.base_model.set_adapter(["default", "dora"])
    x = torch.randn(3, 7)
    expected = unmerged_output(model, x, 0.35)
    before = tensors_of_base(model)
    model.merge_adapter(["default"], noise_level=0.35)
    model.merge_adapter(["dora"], noise_level=0.35)
    torch.testing.assert_close(model(x), expected, rtol=1e-5, atol=1e-5)
    model.unmerge_adapter()
    for name, tensor in tensors_of_base(model).items():
        torch.testing.assert_close(tensor, before[name], rtol=1e-5, atol=1e-6)


def test_while_one_is_merged_layers_that_it_does_not_adapt_still_serve_the_others():
    model = adapted(TwoLayers(), target_modules=["first"])
    model.add_adapter("other", nara_config(target_modules=["second"]))
    disturb(model, seed=4)
    model.base_model.set_adapter(["default", "other"])
    x = torch.randn(3, 7)
    expected = unmerged_output(model, x, 0.35)
    model.merge_adapter(["default"], noise_level=0.35)
    torch.testing.assert_close(unmerged_output(model, x, 0.35), expected, rtol=1e-5, atol=1e-5)
    with pytest.raises(ValueError, match="λ is not known, but adapter"):
        model(x)


def test_merging_only_one_of_two_leaves_the_other_out():
    model = three_adapters()
    x = torch.randn(3, 7)
    model.set_adapter("other")
    expected = unmerged_output(model, x, 0.35)
    model.base_model.set_adapter(["default", "other"])
    merged = model.merge_and_unload(adapter_names=["other"], noise_level=0.35)
    torch.testing.assert_close(merged(x), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.filterwarnings("ignore:Adapter cannot be set when the model is merged")
def test_setting_an_adapter_takes_a_merge_back():
    model = three_adapters()
    x = torch.randn(3, 7)
    model.set_adapter("other")
    expected = unmerged_output(model, x, 0.9)
    model.set_adapter("default")
    model.merge_adapter(noise_level=0.35)
    model.set_adapter("other")
    torch.testing.assert_close(unmerged_output(model, x, 0.9), expected, rtol=1e-5, atol=1e-5)
