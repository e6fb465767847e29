"""Ablations: the mean core, and λ held constant, shuffled or reversed, whoever tells λ."""

from __future__ import annotations

import threading
from typing import Any

import pytest
import torch
from diffusers import UNet2DConditionModel
from peft import PeftModel
from torch import Tensor

from nara_diffusion import core_matrix, noise_level, set_noise_source
from nara_diffusion.dllm import masked_diffusion_loss
from nara_diffusion.noise.ablations import changed_noise, constant_noise, mean_core, reversed_noise, shuffled_noise
from nara_diffusion.noise.signals import NoiseSignals
from tests.helpers.adapted import TwoLayers, adapted, default_core, relative_error

TARGETS = ["first", "second"]
LEVELS = torch.tensor([0.1, 0.55, 0.9])
GRID = torch.linspace(0, 1, 7)


def two_layers(**changes: Any) -> PeftModel:
    torch.manual_seed(3)
    return adapted(TwoLayers(), target_modules=TARGETS, **changes)


def by_hand(model: PeftModel, x: Tensor, core: Tensor) -> Tensor:
    """The output in float64 with C (b, r, r), or (1, r, r), in both layers."""
    h = x.double()
    for name in TARGETS:
        layer = model.base_model.model.get_submodule(name)
        A, B = layer.lora_A["default"].weight.double(), layer.lora_B["default"].weight.double()
        base = layer.get_base_layer()
        W = base.weight.double() + layer.scaling["default"] * torch.einsum("or,brq,qi->boi", B, core, A)
        h = torch.einsum("bi,boi->bo", h, W.expand(len(h), -1, -1)) + base.bias.double()
        h = torch.tanh(h) if name == "first" else h
    return h


# ---------------------------------------------------------------- the mean core


@pytest.mark.parametrize("core_type", ["hypernetwork", "rank_mask", "constant"])
def test_inside_mean_core_every_sample_has_the_mean_of_the_grid(core_type):
    model = two_layers(core_type=core_type)
    x = torch.randn(3, 7)
    mean = default_core(model, GRID).mean(0, keepdim=True)
    with mean_core(model, GRID):
        alone = model(x)
        with noise_level(model, LEVELS):
            assert torch.equal(model(x), alone)
    assert relative_error(alone, by_hand(model, x, mean)) < 5e-6
    with noise_level(model, LEVELS):
        after = model(x)
        assert relative_error(after, by_hand(model, x, default_core(model, LEVELS))) < 5e-6
    assert (after - alone).abs().max() > 1e-3 or core_type == "constant"


@pytest.mark.parametrize("core_sharing", ["module_type", "layer"])
def test_each_layers_own_core_is_averaged(core_sharing):
    model = two_layers(core_sharing=core_sharing)
    means = {name: core_matrix(model, GRID, module=name).mean(0) for name in TARGETS}
    x = torch.randn(3, 7)
    with mean_core(model, GRID.tolist()):
        actual = model(x)
    h = x
    for name in TARGETS:
        layer = model.base_model.model.get_submodule(name)
        A, B = layer.lora_A["default"].weight, layer.lora_B["default"].weight
        h = layer.get_base_layer()(h) + layer.scaling["default"] * h @ (B @ means[name] @ A).T
        h = torch.tanh(h) if name == "first" else h
    torch.testing.assert_close(actual, h, rtol=1e-5, atol=1e-6)


def test_the_mean_follows_the_parameters_and_has_their_gradients():
    model = two_layers()
    x = torch.randn(3, 7)
    core = [p for name, p in model.named_parameters() if "nara_core" in name]
    with mean_core(model, GRID):
        before = model(x)
        before.sum().backward()
        assert all(p.grad is not None and p.grad.abs().max() > 0 for p in core)
        with torch.no_grad():
            core[-1].add_(0.5)
        assert relative_error(model(x), by_hand(model, x, default_core(model, GRID).mean(0, keepdim=True))) < 5e-6


def test_a_core_that_reads_the_mask_density_is_averaged_over_pairs():
    model = two_layers(core_input="both")
    x = torch.randn(3, 7)
    with mean_core(model, GRID), pytest.raises(ValueError, match=r"density is not known.*=… to mean_core\(\)"):
        model(x)
    mean = core_matrix(model, GRID, mask_density=GRID.flip(0)).mean(0, keepdim=True).double()
    with mean_core(model, GRID, mask_density=GRID.flip(0)):
        assert relative_error(model(x), by_hand(model, x, mean)) < 5e-6


# ---------------------------------------------------------------- changed λ

CHANGES = {
    "constant": (constant_noise(0.25), torch.full((3,), 0.25)),
    "reversed": (reversed_noise, 1 - LEVELS),
    "shuffled": (shuffled_noise(torch.Generator().manual_seed(5)), None),
}


def shuffled_by_hand(values: Tensor) -> Tensor:
    return values[torch.randperm(len(values), generator=torch.Generator().manual_seed(5))]


@pytest.mark.parametrize("kind", CHANGES)
def test_cores_read_the_changed_level(kind):
    model = two_layers()
    change, levels = CHANGES[kind]
    levels = shuffled_by_hand(LEVELS) if levels is None else levels
    x = torch.randn(3, 7)
    with changed_noise(model, change), noise_level(model, LEVELS):
        actual = model(x)
    assert not torch.equal(levels, LEVELS)
    assert relative_error(actual, by_hand(model, x, default_core(model, levels))) < 5e-6


def test_both_signals_change_together():
    model = two_layers(core_input="both")
    x, density = torch.randn(3, 7), torch.tensor([0.3, 0.0, 1.0])
    for change, expected in (
        (reversed_noise, (1 - LEVELS, 1 - density)),
        (constant_noise(0.4), (torch.full((3,), 0.4),) * 2),
        (shuffled_noise(torch.Generator().manual_seed(5)), (shuffled_by_hand(LEVELS), shuffled_by_hand(density))),
    ):
        with changed_noise(model, change), noise_level(model, LEVELS, mask_density=density):
            actual = model(x)
        with noise_level(model, expected[0], mask_density=expected[1]):
            assert torch.equal(actual, model(x))


def test_a_source_is_changed_too():
    model = two_layers()

    class Told:
        convention = "told"

        def __call__(self, module: Any, args: Any, kwargs: Any) -> NoiseSignals:
            return NoiseSignals(LEVELS)

    set_noise_source(model, Told())
    x = torch.randn(3, 7)
    with changed_noise(model, reversed_noise):
        assert relative_error(model(x), by_hand(model, x, default_core(model, 1 - LEVELS))) < 5e-6


def test_the_loss_of_language_models_tells_levels_that_a_control_changes(tiny_llama):
    tiny_llama.config.mask_token_id = 49
    model = adapted(tiny_llama, target_modules=["q_proj", "v_proj"])
    ids = torch.randint(0, 49, (4, 10))

    def loss() -> Tensor:
        return masked_diffusion_loss(model, ids, [3] * 4, generator=torch.Generator().manual_seed(2)).per_sample

    plain = loss()
    with changed_noise(model, constant_noise(0.5)):
        constant = loss()
    with mean_core(model, [0.5]):
        assert torch.allclose(loss(), constant, rtol=1e-6)
    assert (constant - plain).abs().max() > 1e-4
    assert torch.equal(loss(), plain)


def test_a_denoisers_timestep_is_changed():
    unet = UNet2DConditionModel(
        block_out_channels=(8,), layers_per_block=1, sample_size=4, norm_num_groups=4, cross_attention_dim=6,
        down_block_types=("CrossAttnDownBlock2D",), up_block_types=("CrossAttnUpBlock2D",), attention_head_dim=4,
    )  # fmt: skip
    model = adapted(unet, target_modules=["to_q", "to_v"])
    sample, text, timestep = torch.randn(2, 4, 4, 4), torch.randn(2, 3, 6), torch.tensor([100, 700])
    with changed_noise(model, constant_noise(0.5)):
        constant = model(sample, timestep, text).sample
    with noise_level(model, 0.5):
        assert torch.allclose(model(sample, timestep, text).sample, constant, atol=1e-6)
    assert (model(sample, timestep, text).sample - constant).abs().max() > 1e-4


# ---------------------------------------------------------------- contexts


def test_contexts_nest_and_come_back_after_errors():
    model = two_layers()
    x = torch.randn(3, 7)
    with noise_level(model, LEVELS):
        plain = model(x)
        with changed_noise(model, reversed_noise):
            outer = model(x)
            with mean_core(model, GRID):
                assert (model(x) - outer).abs().max() > 1e-4
            assert torch.equal(model(x), outer)
            with pytest.raises(RuntimeError), mean_core(model, GRID):
                model(torch.randn(3, 8))
            assert torch.equal(model(x), outer)
        assert torch.equal(model(x), plain)


def test_other_models_and_threads_are_not_ablated():
    model, other = two_layers(), two_layers()
    x, found = torch.randn(3, 7), []

    def run() -> None:
        with noise_level(model, LEVELS):
            found.append(model(x))

    run()
    with changed_noise(model, reversed_noise):
        with noise_level(other, LEVELS):
            assert torch.equal(other(x), found[0])
        thread = threading.Thread(target=run)
        thread.start()
        thread.join()
    assert torch.equal(found[0], found[1])


def test_a_checkpointed_block_is_recomputed_with_what_its_forward_read(tiny_llama):
    model = adapted(tiny_llama, target_modules=["q_proj", "down_proj"]).train()
    ids = torch.randint(0, 49, (3, 8))

    def gradients(change: Any) -> list[Tensor]:
        model.zero_grad()
        with changed_noise(model, change), noise_level(model, LEVELS):
            logits = model(ids).logits
        logits.square().mean().backward()  # after the contexts
        return [p.grad.clone() for p in model.parameters() if p.grad is not None]

    expected = gradients(shuffled_noise(torch.Generator().manual_seed(5)))
    enable = getattr(tiny_llama, "activation_checkpointing_enable", tiny_llama.gradient_checkpointing_enable)
    enable({"use_reentrant": False})
    actual = gradients(shuffled_noise(torch.Generator().manual_seed(5)))
    assert len(actual) == len(expected) > 0
    for one, other in zip(actual, expected, strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda signals: NoiseSignals(signals.noise_level[:2]), "returned 2 values for 3"),
        (lambda signals: NoiseSignals(signals.noise_level * 2), r"every value has to lie in \[0, 1\]"),
    ],
)
def test_a_change_that_makes_no_levels_is_refused(change, message):
    model = two_layers()
    with changed_noise(model, change), noise_level(model, LEVELS), pytest.raises(ValueError, match=message):
        model(torch.randn(3, 7))


def test_values_out_of_range_and_models_without_adapters_are_refused():
    with pytest.raises(ValueError, match=r"noise_level is \[1.5\]"):
        constant_noise(1.5)
    with pytest.raises(ValueError, match=r"every value has to lie in \[0, 1\]"):
        mean_core(two_layers(), [0.5, -1.0])
    with pytest.raises(ValueError, match="TwoLayers holds no NaRA adapter"), mean_core(TwoLayers(), GRID):
        pass


def test_merging_and_controls_exclude_each_other():
    model = two_layers()
    with mean_core(model, GRID), pytest.raises(ValueError, match="cannot be merged inside mean_core"):
        model.merge_adapter(noise_level=0.3)
    model.merge_adapter(noise_level=0.3)
    with (
        pytest.raises(ValueError, match=r"'default' are merged at one λ.*unmerge_adapter"),
        changed_noise(model, reversed_noise),
    ):
        pass
