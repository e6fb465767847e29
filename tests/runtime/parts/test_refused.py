"""A part of an adapted model that is called by itself: what is refused, with a remedy."""

from __future__ import annotations

import copy

import pytest
import torch
from diffusers import AutoencoderKL, UNetMotionModel
from peft import PeftModel, inject_adapter_in_model
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from nara_diffusion import noise_level
from nara_diffusion.noise.ablations import changed_noise, constant_noise
from tests.helpers.adapted import TwoLayers, adapted, disturb, nara_config, relative_error
from tests.helpers.two_layers import LEVELS, TARGETS, expect, parts_in_turn

pytestmark = pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable` is deprecated:FutureWarning")


def test_a_part_that_is_merged_at_another_level_is_refused(model: PeftModel, x: Tensor) -> None:
    merged = expect(model, x, 0.2)
    model.merge_adapter(noise_level=0.2)
    for name in ("as merged", "copied"):
        one = model if name == "as merged" else copy.deepcopy(model)
        assert relative_error(parts_in_turn(one, x), merged) < 5e-6
        with noise_level(one, 0.2):
            assert relative_error(parts_in_turn(one, x), merged) < 5e-6
        with noise_level(one, 0.9), pytest.raises(ValueError, match=r"merged at noise_level 0\.2"):
            one.base_model.model.first(x)
        one.unmerge_adapter()
        with noise_level(one, 0.9):
            assert relative_error(parts_in_turn(one, x), expect(one, x, 0.9)) < 5e-6
        assert not one.base_model.model.first._forward_pre_hooks
        if one is model:
            model.merge_adapter(noise_level=0.2)


def test_a_part_past_fused_projections_is_refused() -> None:
    torch.manual_seed(0)
    vae = AutoencoderKL(block_out_channels=(8,), norm_num_groups=4, latent_channels=4, layers_per_block=1).eval()
    vae.add_adapter(nara_config(target_modules=["to_q", "to_v"], noise_convention="mine"))
    disturb(vae)
    vae.fuse_qkv_projections()
    with pytest.raises(ValueError, match=r"fuse_qkv_projections\(\) has replaced it"), noise_level(vae, 0.3):
        vae.encode(torch.randn(3, 3, 8, 8))


def test_changed_noise_is_refused_in_a_part(model: PeftModel, x: Tensor) -> None:
    with (
        changed_noise(model, constant_noise(0.5)),
        noise_level(model, 0.3),
        pytest.raises(ValueError, match="once a forward of the whole model: call the whole model"),
    ):
        model.base_model.model.first(x)


def test_a_density_that_is_not_told_is_refused_in_a_part(x: Tensor) -> None:
    model = adapted(TwoLayers(), target_modules=TARGETS, core_input="both", mask_density_radius=3)
    with noise_level(model, 0.3), pytest.raises(ValueError, match=r"mask density is not known.*mask_density="):
        model.base_model.model.first(x)
    with noise_level(model, 0.3, mask_density=LEVELS):
        assert torch.equal(parts_in_turn(model, x), model(x))


@pytest.mark.parametrize("reentrant", [False, True])
def test_a_checkpoint_of_one_s_own_around_a_part_is_refused(model: PeftModel, x: Tensor, reentrant: bool) -> None:
    model.train()
    x.requires_grad_()
    with noise_level(model, LEVELS):
        loss = checkpoint(model.base_model.model.first, x, use_reentrant=reentrant).square().mean()
        with pytest.raises(RuntimeError, match=r"No C\(λ\).*a checkpoint other than the model's own"):
            loss.backward()

    def inside(x: Tensor) -> Tensor:
        with noise_level(model, LEVELS):
            return model.base_model.model.first(x)

    checkpoint(inside, x, use_reentrant=reentrant).square().mean().backward()


def test_several_levels_in_a_part_of_a_model_that_repeats_its_batch_are_refused() -> None:
    motion = UNetMotionModel(
        block_out_channels=(8, 8), layers_per_block=1, norm_num_groups=4, cross_attention_dim=6,
        motion_num_attention_heads=2, motion_max_seq_length=4, num_attention_heads=2, sample_size=4,
        down_block_types=("CrossAttnDownBlockMotion", "DownBlockMotion"),
        up_block_types=("UpBlockMotion", "CrossAttnUpBlockMotion"),
    )  # fmt: skip
    model = inject_adapter_in_model(nara_config(target_modules=["linear_1"]), motion)
    disturb(model)
    x = torch.randn(2, 8)
    with noise_level(model, LEVELS[:2]), pytest.raises(ValueError, match="cannot be told apart: pass one value"):
        model.time_embedding(x)
    with noise_level(model, 0.3):
        shared = model.time_embedding(x)
    assert (shared - motion.time_embedding.linear_1.base_layer(x).mean()).abs().max() > 0
