"""Wan 2.2: one transformer for much noise, another one for little, and one file for the adapters of both."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from safetensors import safe_open

from nara_diffusion import noise_level
from tests.diffusers.reference import ATTENTION, watch
from tests.helpers.adapted import disturb, nara_config
from tests.helpers.pipelines.wan import small_wan, wan_latents
from tests.helpers.small_pipelines import small_sd

BOTH = ("transformer", "transformer_2")


def adapted_wan() -> Any:
    """A pipeline of two transformers with adapters of unlike rank and weights."""
    pipe = small_wan(transformers=2)
    for component, rank, seed in (("transformer", 4, 1), ("transformer_2", 2, 2)):
        model = getattr(pipe, component)
        model.add_adapter(nara_config(target_modules=ATTENTION, r=rank))
        disturb(model, seed)
    return pipe


def test_one_file_holds_both_and_loads_into_both(tmp_path):
    pipe = adapted_wan()
    expected = wan_latents(pipe)
    pipe.save_nara_weights(tmp_path)
    with safe_open(tmp_path / "pytorch_nara_weights.safetensors", "pt") as file:
        held = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118  (it is no dictionary)
    for component in BOTH:
        own = {key for key in held if key.startswith(f"{component}.")}
        layers = 2 * len(ATTENTION)  # self-attention and cross-attention
        assert sum(".lora_A." in key for key in own) == sum(".lora_B." in key for key in own) == layers
        assert any("nara_core" in key for key in own)
    assert {key.partition(".")[0] for key in held} == set(BOTH)

    other = small_wan(transformers=2)
    plain = wan_latents(other)
    other.load_nara_weights(tmp_path, adapter_name="wan")
    assert torch.equal(wan_latents(other), expected)
    assert not torch.allclose(expected, plain, atol=1e-3)
    other.unload_nara_weights()
    assert torch.equal(wan_latents(other), plain)


def test_each_transformer_reads_the_level_of_its_own_steps():
    pipe = adapted_wan()
    levels = {component: watch(getattr(pipe, component)) for component in BOTH}
    wan_latents(pipe, num_inference_steps=6)
    sigmas = [float(sigma) for sigma in pipe.scheduler.sigmas[:6] for _ in range(2)]  # with and without the prompt
    expected = {
        "transformer": [sigma for sigma in sigmas if sigma >= 0.7],
        "transformer_2": [sigma for sigma in sigmas if sigma < 0.7],
    }
    for component in BOTH:
        assert len(expected[component]) >= 4
        assert levels[component] == [[pytest.approx(sigma, abs=1e-6)] for sigma in expected[component]]


@pytest.mark.parametrize("changed", BOTH)
def test_each_part_of_the_file_is_that_of_its_transformer(tmp_path, changed):
    """A change of one transformer's adapter before it is saved is found in that one alone."""
    pipe = adapted_wan()
    model = getattr(pipe, changed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".lora_B." in name:
                parameter += 1
    pipe.save_nara_weights(tmp_path)
    other, before = small_wan(transformers=2), adapted_wan()
    other.load_nara_weights(tmp_path, adapter_name="default")
    for component in BOTH:
        loaded, old = (getattr(either, component).state_dict() for either in (other, before))
        same = all(torch.equal(loaded[key], old[key]) for key in old if ".lora_B." in key)
        assert same == (component != changed)


def test_strength_activation_and_deletion_reach_both():
    pipe = adapted_wan()
    full = wan_latents(pipe)
    plain = wan_latents(small_wan(transformers=2))
    pipe.set_adapters("default", 0.0)
    assert torch.equal(wan_latents(pipe), plain)
    pipe.set_adapters("default", 1.0)
    assert torch.equal(wan_latents(pipe), full)
    pipe.disable_lora()
    assert torch.equal(wan_latents(pipe), plain)
    pipe.enable_lora()
    with noise_level(pipe.transformer, 0.2), noise_level(pipe.transformer_2, 0.9):
        assert not torch.allclose(wan_latents(pipe), full, atol=1e-4)
    pipe.delete_adapters("default")
    assert torch.equal(wan_latents(pipe), plain)


def test_a_file_of_both_is_refused_where_there_is_one_transformer(tmp_path):
    adapted_wan().save_nara_weights(tmp_path)
    pipe = small_wan()
    before = wan_latents(pipe)
    with pytest.raises(ValueError, match="It has a part for 'transformer_2', but this WanPipeline has 'transformer'"):
        pipe.load_nara_weights(tmp_path)
    assert torch.equal(wan_latents(pipe), before)


def test_a_swap_in_place_reaches_both(tmp_path):
    pipe = adapted_wan()
    disturb(pipe.transformer, 5)
    disturb(pipe.transformer_2, 6)
    expected = wan_latents(pipe)
    pipe.save_nara_weights(tmp_path)
    other = small_wan(transformers=2)
    adapted_wan().save_nara_weights(tmp_path / "first")
    other.load_nara_weights(tmp_path / "first", adapter_name="wan")
    other.load_nara_weights(tmp_path, adapter_name="wan", hotswap=True)
    assert torch.equal(wan_latents(other), expected)


def test_an_adapter_on_a_component_that_the_file_has_no_place_for_is_refused(tmp_path):
    pipe = small_sd()
    for model, kind in ((pipe.unet, "hypernetwork"), (pipe.vae, "identity")):
        model.add_adapter(nara_config(target_modules=["to_q", "to_v"], core_type=kind))
    with pytest.raises(ValueError, match="'default' is in 'vae' too"):
        pipe.save_nara_weights(tmp_path)
    assert not list(tmp_path.iterdir())
