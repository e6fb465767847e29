"""A part of an adapted model that is called by itself: it has the λ that is told, and none where none is."""

from __future__ import annotations

import contextvars
import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKL, UNetMotionModel
from peft import PeftModel, inject_adapter_in_model
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    CLIPConfig,
    CLIPModel,
    T5Config,
    T5ForConditionalGeneration,
)

from nara_diffusion import noise_level, set_noise_source
from nara_diffusion.noise.ablations import changed_noise, constant_noise, mean_core
from nara_diffusion.noise.signals import NoiseSignals
from tests.helpers.adapted import TwoLayers, adapted, default_core, disturb, nara_config, relative_error
from tests.helpers.channel_calls import expect_no_core
from tests.helpers.recomputation import check, gradients
from tests.helpers.two_layers import LEVELS, TARGETS, by_hand, expect, run

pytestmark = pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable` is deprecated:FutureWarning")


@pytest.fixture
def model() -> PeftModel:
    return adapted(TwoLayers(), target_modules=TARGETS)


@pytest.fixture
def x() -> Tensor:
    return torch.randn(3, 7)


def parts_in_turn(model: PeftModel, x: Tensor) -> Tensor:
    """The two layers of a TwoLayers, called by themselves."""
    root = model.base_model.model
    return root.second(torch.tanh(root.first(x)))


# ---------------------------------------------------------------------- λ


@pytest.mark.parametrize("level", [0.3, LEVELS], ids=["shared", "per sample"])
def test_a_part_has_the_level_that_is_told(model: PeftModel, x: Tensor, level: Any) -> None:
    with noise_level(model, level):
        assert relative_error(parts_in_turn(model, x), expect(model, x, level)) < 2e-6
        with noise_level(model, 0.8):
            assert relative_error(parts_in_turn(model, x), expect(model, x, 0.8)) < 2e-6
        assert relative_error(parts_in_turn(model, x), expect(model, x, level)) < 2e-6
    expect_no_core(model.base_model.model.first, x)


@pytest.mark.parametrize("core_sharing", ["module_type", "layer"])
def test_a_part_reads_the_core_of_its_own_group(x: Tensor, core_sharing: str) -> None:
    model = adapted(TwoLayers(), target_modules=TARGETS, core_sharing=core_sharing)
    with noise_level(model, LEVELS):
        assert torch.equal(parts_in_turn(model, x), model(x))


@pytest.mark.parametrize("core_type", ["constant", "identity"])
def test_a_part_whose_core_needs_no_level_works_without_one(x: Tensor, core_type: str) -> None:
    model = adapted(TwoLayers(), target_modules=TARGETS, core_type=core_type)
    assert torch.equal(parts_in_turn(model, x), model(x))


def test_a_source_is_not_asked_by_a_part(model: PeftModel, x: Tensor) -> None:
    set_noise_source(model, lambda module, args, kwargs: NoiseSignals(LEVELS))  # type: ignore[arg-type]
    assert relative_error(run(model, x), expect(model, x, LEVELS)) < 2e-6
    expect_no_core(model.base_model.model.first, x)


def test_a_part_sees_the_core_of_after_an_optimizer_step(model: PeftModel, x: Tensor) -> None:
    """Inside one context; F has gradients, those that a forward of the whole model gives."""
    model.requires_grad_(True)
    whole = copy.deepcopy(model)
    for call, one in ((parts_in_turn, model), (lambda model, x: model(x), whole)):
        optimizer = torch.optim.SGD(one.parameters(), lr=0.1)
        with noise_level(one, LEVELS):
            for _ in range(3):
                optimizer.zero_grad()
                call(one, x).square().mean().backward()
                optimizer.step()
            assert relative_error(call(one, x), by_hand(one, x, default_core(one, LEVELS))) < 5e-6
    for (name, actual), (_, expected) in zip(model.named_parameters(), whole.named_parameters(), strict=True):
        assert expected.grad.abs().max() > 0, name
        torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-6, msg=name)


def test_adapters_that_are_switched_off_or_mixed_in_a_part(model: PeftModel, x: Tensor) -> None:
    root = model.base_model.model
    model.add_adapter("other", nara_config(target_modules=TARGETS, r=3))
    disturb(root.nara_core.cores["other"], seed=5)
    for layer in (root.first, root.second):
        nn.init.normal_(layer.lora_B["other"].weight)

    class Parts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = root.first, root.second

    names = ["other", "default", "other"]
    with noise_level(model, LEVELS):
        model.base_model.set_adapter(["default", "other"])
        assert torch.equal(parts_in_turn(model, x), model(x))
        with model.base_model._enable_peft_forward_hooks(adapter_names=names):
            mixed = parts_in_turn(model, x)
        torch.testing.assert_close(mixed, model(x, adapter_names=names))
        with model.disable_adapter():
            assert torch.equal(parts_in_turn(model, x), root.second.base_layer(torch.tanh(root.first.base_layer(x))))


def test_the_mean_core_in_a_part(model: PeftModel, x: Tensor) -> None:
    grid = torch.linspace(0, 1, 7)
    mean = default_core(model, grid).mean(0, keepdim=True).expand(3, -1, -1)
    with mean_core(model, grid):
        assert relative_error(parts_in_turn(model, x), by_hand(model, x, mean)) < 5e-6


def test_a_part_inside_a_forward_has_the_level_of_its_own_context(model: PeftModel, x: Tensor) -> None:
    root = model.base_model.model
    inner: list[Tensor] = []

    def call_a_part(*_: Any) -> None:
        handle.remove()
        with noise_level(model, 0.9):
            inner.append(parts_in_turn(model, x))
        with mean_core(model, [0.7]):
            inner.append(parts_in_turn(model, x))

    with torch.no_grad():
        handle = root.second.register_forward_pre_hook(call_a_part)
        with noise_level(model, 0.2):
            outer = model(x)
    for actual, level in zip((outer, *inner), (0.2, 0.9, 0.7), strict=True):
        assert relative_error(actual, expect(model, x, level)) < 2e-6


def test_a_part_inside_a_forward_has_the_level_of_the_context_that_it_runs_in(model: PeftModel, x: Tensor) -> None:
    """A `contextvars.Context` that was copied inside of `noise_level`, before the forward began."""
    inner: list[Tensor] = []
    with noise_level(model, 0.9), torch.no_grad():
        told = contextvars.copy_context()
        set_noise_source(model, lambda module, args, kwargs: NoiseSignals(torch.tensor([0.2])))  # type: ignore[arg-type]

        def call_a_part(*_: Any) -> None:
            handle.remove()
            inner.append(told.run(parts_in_turn, model, x))

        handle = model.base_model.model.second.register_forward_pre_hook(call_a_part)
        outer = contextvars.Context().run(model, x)
    for actual, level in ((outer, 0.2), (inner[0], 0.9)):
        assert relative_error(actual, expect(model, x, level)) < 2e-6, level


# ---------------------------------------------------------------------- refused


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
    vae.add_adapter(nara_config(target_modules=["to_q", "to_v"]))
    disturb(vae)
    vae.fuse_qkv_projections()
    with pytest.raises(ValueError, match=r"fuse_qkv_projections\(\) has put a copy"), noise_level(vae, 0.3):
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


# ---------------------------------------------------------------------- models whose parts are called


def t5() -> Any:
    torch.manual_seed(0)
    return T5ForConditionalGeneration(
        T5Config(
            vocab_size=49, d_model=16, d_kv=4, d_ff=24, num_layers=2, num_heads=3, decoder_start_token_id=0,
            dropout_rate=0.0,
        )
    )  # fmt: skip


def bart() -> Any:
    torch.manual_seed(0)
    return BartForConditionalGeneration(
        BartConfig(
            vocab_size=49, d_model=16, encoder_layers=2, decoder_layers=2, encoder_attention_heads=2,
            decoder_attention_heads=2, encoder_ffn_dim=24, decoder_ffn_dim=24, max_position_embeddings=20,
            forced_eos_token_id=None, dropout=0.0,
        )
    )  # fmt: skip


@pytest.mark.parametrize(
    ("make", "targets"), [(t5, ["q", "v", "wo"]), (bart, ["q_proj", "v_proj", "fc2"])], ids=["T5", "BART"]
)
def test_generate_of_an_encoder_and_decoder_equals_forwards_of_the_whole(make: Callable[[], Any], targets: Any) -> None:
    model = adapted(make(), target_modules=targets)
    ids = torch.randint(3, 49, (3, 6), generator=torch.Generator().manual_seed(1))
    with noise_level(model, LEVELS), torch.no_grad():
        produced = model.generate(
            input_ids=ids, max_new_tokens=5, do_sample=False, output_logits=True, return_dict_in_generate=True
        )
        whole = model(input_ids=ids, decoder_input_ids=produced.sequences[:, :-1]).logits
    for position, logits in enumerate(produced.logits):
        torch.testing.assert_close(logits, whole[:, position])
    with noise_level(model, 0.5), torch.no_grad():
        other = model(input_ids=ids, decoder_input_ids=produced.sequences[:, :-1]).logits
    assert (other - whole).abs().max() > 1e-3


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_of_an_encoder_called_alone(reentrant: bool) -> None:
    """By the model's own call, before any forward of the whole: each recomputation has the λ of its forward."""
    model = adapted(t5(), target_modules=["q", "v", "wo"]).train()
    ids = torch.randint(3, 49, (3, 6), generator=torch.Generator().manual_seed(1))
    levels = (LEVELS, LEVELS.flip(0))

    def forward(level: Tensor) -> Tensor:
        with noise_level(model, level):
            return model.base_model.model.get_encoder()(input_ids=ids)[0].pow(3).mean()  # (its norm is 1)

    forwards = [lambda level=level: forward(level) for level in levels]
    expected = gradients(model, forwards)
    model.base_model.model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    if reentrant:
        model.base_model.model.enable_input_require_grads()
    check(
        gradients(model, forwards), expected, 1e-5
    )  # sums over layers, each of which made its own C, in another order


def test_text_features_of_clip() -> None:
    torch.manual_seed(0)
    text = {"vocab_size": 49, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "bos_token_id": 0}
    text |= {"num_attention_heads": 2, "max_position_embeddings": 8, "eos_token_id": 48, "pad_token_id": 1}
    vision = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    vision |= {"image_size": 8, "patch_size": 4}
    clip = CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=6))
    model = adapted(clip, target_modules=["q_proj", "v_proj", "fc1", "text_projection"])
    ids = torch.randint(2, 48, (3, 7), generator=torch.Generator().manual_seed(1))
    pixels = torch.randn(3, 3, 8, 8)
    with noise_level(model, LEVELS), torch.no_grad():
        alone = clip.get_text_features(input_ids=ids)
        whole = model(input_ids=ids, pixel_values=pixels)
    features = alone if isinstance(alone, Tensor) else alone.pooler_output
    torch.testing.assert_close(features / features.norm(dim=-1, keepdim=True), whole.text_embeds)


def test_encode_and_decode_of_a_vae_equal_its_forward() -> None:
    torch.manual_seed(0)
    vae = AutoencoderKL(block_out_channels=(8,), norm_num_groups=4, latent_channels=4, layers_per_block=1).eval()
    vae.add_adapter(nara_config(target_modules=["conv1", "conv2", "to_q", "to_v"]))
    disturb(vae)
    images = torch.randn(3, 3, 8, 8)
    with noise_level(vae, LEVELS), torch.no_grad():
        parts = vae.decode(vae.encode(images).latent_dist.mode()).sample
        whole = vae(images).sample
    assert torch.equal(parts, whole)
