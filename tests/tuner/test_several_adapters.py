"""Several adapters on one model: together, in turn, switched off, deleted, scaled, and what the model says of them."""

from __future__ import annotations

import pytest
import torch
from peft import get_peft_model
from peft.helpers import rescale_adapter_scale
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from nara_diffusion import core_matrix, noise_level
from nara_diffusion.noise.needs import is_noise_aware
from tests.helpers.adapted import TwoLayers, adapted, disturb, nara_config, relative_error
from tests.tuner.three_adapters import LEVELS, TARGETS, by_hand, three_adapters

# ---------------------------------------------------------------- together and in turn


@pytest.mark.parametrize(
    "names",
    [["default"], ["other"], ["plain"], ["default", "other"], ["plain", "other"], ["other", "plain", "default"]],
)
def test_active_adapters_add_up_to_the_sum_written_by_hand(names):
    model = three_adapters()
    model.base_model.set_adapter(names)
    x = torch.randn(3, 7)
    with noise_level(model, LEVELS):
        assert relative_error(model(x), by_hand(model, x, [names] * 3, LEVELS)) < 5e-6


def test_only_active_adapters_train_each_with_its_own_core():
    model = three_adapters()

    def trainable() -> set[str]:
        return {
            part
            for name, p in model.named_parameters()
            if p.requires_grad
            for part in (*name.split("."), "core" if "nara_core" in name else "")
            if part in (*model.peft_config, "core")
        }

    assert trainable() == {"default", "core"}
    model.set_adapter("other")
    assert trainable() == {"other", "core"}
    model.set_adapter("plain")
    assert trainable() == {"plain"}
    model.base_model.set_adapter(["default", "plain"])
    assert trainable() == {"default", "plain", "core"}
    model.set_adapter("default", inference_mode=True)
    assert trainable() == set()
    model.set_requires_grad(["other", "plain"])
    assert trainable() == {"other", "plain", "core"}
    model.set_requires_grad("other", requires_grad=False)
    assert trainable() == {"plain"}


def test_every_parameter_of_active_adapters_gets_a_gradient_and_no_other():
    model = three_adapters().train()
    model.base_model.set_adapter(["default", "other"])
    with noise_level(model, LEVELS):
        model(torch.randn(3, 7)).square().sum().backward()
    for name, p in model.named_parameters():
        active = ".default." in name or ".other." in name
        assert (p.grad is not None) == active, name
        assert not active or p.grad.abs().max() > 0, name


def test_adding_an_adapter_changes_neither_what_is_active_nor_what_trains():
    model = adapted(TwoLayers(), target_modules=TARGETS)
    model.set_requires_grad("default", requires_grad=False)
    holder = model.base_model.model.nara_core
    holder.cores["default"].requires_grad_(True)  # as a trainer may: the core alone
    before = {name: p.requires_grad for name, p in model.named_parameters()}
    x = torch.randn(3, 7)
    with noise_level(model, LEVELS):
        expected = model(x)
        model.add_adapter("other", nara_config(target_modules=TARGETS, core_init="kaiming"))
        assert torch.equal(model(x), expected)
    after = {name: p.requires_grad for name, p in model.named_parameters()}
    assert {name: after[name] for name in before} == before
    assert not any(value for name, value in after.items() if ".other." in name)
    assert model.active_adapters == ["default"]


def test_each_adapter_keeps_its_own_frequencies():
    model = adapted(TwoLayers(), target_modules=["first"])
    model.add_adapter("other", nara_config(target_modules=["first"]))
    state = model.state_dict()
    a, b = (
        state[f"base_model.model.nara_core.cores.{name}.shared.embeddings.noise_level.frequencies"]
        for name in ("default", "other")
    )
    assert not torch.equal(a, b)


def test_a_duplicate_adapter_name_is_refused():
    model = adapted(TwoLayers(), target_modules=["first"])
    with pytest.raises(ValueError, match="'default' already exists"):
        model.add_adapter("default", nara_config(target_modules=["first"]))


def test_modules_to_save_named_like_a_part_of_a_core_are_those_of_the_base_model():
    base = TwoLayers()
    base.embeddings, base.projection = nn.Linear(3, 3), nn.Linear(2, 2)
    model = adapted(base, target_modules=["first"], noise_embedding="mlp")
    model.add_adapter("other", nara_config(target_modules=["second"], modules_to_save=["embeddings", "projection"]))
    wrapped = {name for name, module in model.named_modules() if type(module).__name__ == "ModulesToSaveWrapper"}
    assert wrapped == {"base_model.model.embeddings", "base_model.model.projection"}


# ---------------------------------------------------------------- off, deleted, unloaded


def test_disabled_it_is_the_base_model_and_needs_no_level():
    base = TwoLayers()
    x = torch.randn(3, 7)
    expected = base(x)
    model = adapted(base, target_modules=TARGETS)
    with model.disable_adapter():
        assert not is_noise_aware(model)
        assert torch.equal(model(x), expected)
        assert model.get_model_status().enabled is False
        with noise_level(model, LEVELS):
            assert torch.equal(model(x), expected)
    assert is_noise_aware(model)
    assert model.get_model_status().enabled is True
    model.base_model.disable_adapter_layers()
    assert torch.equal(model(x), expected)
    model.base_model.enable_adapter_layers()
    with noise_level(model, LEVELS):
        assert not torch.equal(model(x), expected)
    with pytest.raises(ValueError, match="λ is not known"):
        model(x)


@pytest.mark.filterwarnings("ignore:Adapter default was active which is now deleted")
def test_a_deleted_adapter_leaves_nothing_behind():
    model = three_adapters()
    model.delete_adapter("default")
    assert not any(".default." in name for name in model.state_dict())
    holder = model.base_model.model.nara_core
    assert set(holder.cores) == set(holder.r) == {"other", "plain"}
    assert not any("default" in layer.lora_variant for layer in model.modules() if hasattr(layer, "lora_variant"))
    x = torch.randn(3, 7)
    model.set_adapter("other")
    with noise_level(model, LEVELS):
        assert relative_error(model(x), by_hand(model, x, [["other"]] * 3, LEVELS)) < 5e-6
    model.add_adapter("default", nara_config(target_modules=["second"]))  # the name is free again
    model.set_adapter("default")
    assert model.get_model_status().active_adapters == ["default"]


def test_one_of_two_active_adapters_may_be_deleted():
    model = three_adapters()
    model.base_model.set_adapter(["default", "other"])
    model.delete_adapter("default")
    assert model.active_adapters == ["other"]
    x = torch.randn(3, 7)
    with noise_level(model, LEVELS):
        assert relative_error(model(x), by_hand(model, x, [["other"]] * 3, LEVELS)) < 5e-6


@pytest.mark.filterwarnings("ignore:Adapter other was active which is now deleted")
def test_deleting_the_active_adapter_activates_one_other_in_all_layers():
    model = adapted(TwoLayers(), target_modules=["first"])
    model.add_adapter("b", nara_config(target_modules=["second"]))
    model.add_adapter("other", nara_config(target_modules=TARGETS))
    disturb(model, seed=4)
    model.eval().set_adapter("other")
    model.delete_adapter("other")
    layers = [module for module in model.modules() if isinstance(module, BaseTunerLayer)]
    assert [layer.active_adapters for layer in layers] == [["b"]] * 3
    assert model.active_adapters == ["b"]
    x = torch.randn(3, 7)
    with noise_level(model, LEVELS):
        assert relative_error(model(x), by_hand(model, x, [["b"]] * 3, LEVELS)) < 5e-6


def test_an_adapter_added_to_a_disabled_model_is_disabled_in_all_layers():
    base = TwoLayers()
    x = torch.randn(3, 7)
    expected = base(x)
    model = adapted(base, target_modules=["first"])
    model.base_model.disable_adapter_layers()
    model.add_adapter("other", nara_config(target_modules=TARGETS))
    model.set_adapter("other")
    disturb(model)
    assert torch.equal(model(x), expected)
    model.base_model.enable_adapter_layers()
    with noise_level(model, LEVELS):
        assert relative_error(model(x), by_hand(model, x, [["other"]] * 3, LEVELS)) < 5e-6


def test_the_last_adapter_may_be_deleted_and_another_one_added():
    base = TwoLayers()
    x = torch.randn(3, 7)
    expected = base(x)
    model = adapted(base, target_modules=TARGETS)
    model.base_model.delete_adapter("default")
    assert torch.equal(model.base_model(x), expected)
    assert not is_noise_aware(model)
    assert not [name for name in model.state_dict() if "lora_" in name or "nara_core" in name]
    model.add_adapter("new", nara_config(target_modules=["first"]))
    model.set_adapter("new")
    disturb(model)
    with noise_level(model, LEVELS):
        assert relative_error(model(x), by_hand(model, x, [["new"]] * 3, LEVELS)) < 5e-6


def test_unloading_gives_the_base_model_back():
    base = TwoLayers()
    x = torch.randn(3, 7)
    expected, modules = base(x), {name: type(module) for name, module in base.named_modules()}
    model = adapted(base, target_modules=TARGETS)
    with noise_level(model, LEVELS):
        model(x)
        plain = model.unload()
        assert torch.equal(plain(x), expected)
    assert plain is base
    assert {name: type(module) for name, module in plain.named_modules()} == modules
    assert not base._forward_pre_hooks
    assert not base._forward_hooks
    assert not hasattr(base, "peft_config")
    again = adapted(plain, target_modules=TARGETS)  # and it may be adapted once more
    with noise_level(again, LEVELS):
        assert not torch.equal(again(x), expected)


# ---------------------------------------------------------------- scales and status


def test_scales_multiply_the_update_and_not_the_deviation_of_the_core():
    model = adapted(TwoLayers(), target_modules=["second"])
    x = torch.randn(3, 7)
    with noise_level(model, LEVELS):
        full = model(x)
        with model.disable_adapter():
            base = model(x)
        with rescale_adapter_scale(model, 0.5):
            torch.testing.assert_close(model(x), (full + base) / 2, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(model(x), full)
        layers = [m for m in model.modules() if hasattr(m, "set_scale")]
        for layer in layers:
            layer.set_scale("default", 0.25)
        torch.testing.assert_close(model(x), base + (full - base) / 4, rtol=1e-5, atol=1e-5)
        for layer in layers:
            layer.scale_layer(2)
        torch.testing.assert_close(model(x), (full + base) / 2, rtol=1e-5, atol=1e-5)
        for layer in layers:
            layer.unscale_layer()
        torch.testing.assert_close(model(x), full, rtol=1e-5, atol=1e-5)


def test_status_and_counts_tell_of_every_adapter():
    model = three_adapters()
    status = model.get_model_status()
    assert status.enabled is True
    assert status.active_adapters == ["default"]
    assert status.available_adapters == ["default", "other", "plain"]
    assert status.merged_adapters == []
    assert status.requires_grad == {"default": True, "other": False, "plain": False}
    assert status.devices == {"default": ["cpu"], "other": ["cpu"], "plain": ["cpu"]}
    assert status.num_adapter_layers == 3  # two layers and the holder of the cores
    trainable = [p.numel() for n, p in model.named_parameters() if ".default." in n]
    assert model.get_nb_trainable_parameters() == (sum(trainable), sum(p.numel() for p in model.parameters()))
    names = [layer.name for layer in model.get_layer_status()]
    assert names == ["model.first", "model.second", "model.nara_core"]
    model.merge_adapter(noise_level=0.3)
    assert model.get_model_status().merged_adapters == ["default"]


# ---------------------------------------------------------------- adapted models inside a module


class Pair(nn.Module):
    """Two adapted models under one roof, as a pipeline's parts may be."""

    def __init__(self) -> None:
        super().__init__()
        self.left = adapted(TwoLayers(), target_modules=["first"])
        self.right = get_peft_model(TwoLayers(), nara_config(target_modules=["second"], r=2), adapter_name="other")
        disturb(self.right, seed=6)

    def forward(self, x: Tensor) -> Tensor:
        return self.left(x) + self.right(x)


def test_one_level_serves_every_adapted_model_below():
    pair = Pair()
    x = torch.randn(3, 7)
    with noise_level(pair, LEVELS):
        both = pair(x)
    with noise_level(pair.left, LEVELS), noise_level(pair.right, LEVELS):
        assert torch.equal(pair(x), both)
    with noise_level(pair.left, LEVELS), pytest.raises(ValueError, match="λ is not known"):
        pair(x)
    assert core_matrix(pair, 0.3, "other").shape == (1, 2, 2)
    with pytest.raises(ValueError, match="no adapter 'nobody': the model has 'default', 'other'"):
        core_matrix(pair, 0.3, "nobody")


def test_two_adapters_of_one_name_need_the_model_that_is_meant():
    pair = Pair()
    pair.right = adapted(TwoLayers(), target_modules=["first"])
    with pytest.raises(ValueError, match="2 models below Pair have an adapter 'default': pass the one that is meant"):
        core_matrix(pair, 0.3)
