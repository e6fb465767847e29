"""Models whose parts are called by themselves: encoders in `generate`, CLIP's towers, autoencoders."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKL
from peft import PeftModel
from torch import Tensor
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    CLIPConfig,
    CLIPModel,
    T5Config,
    T5ForConditionalGeneration,
)

from nara_diffusion import noise_level
from tests.helpers.adapted import TwoLayers, adapted, disturb, nara_config
from tests.helpers.layers.recomputation import check, gradients
from tests.helpers.two_layers import LEVELS, TARGETS

pytestmark = pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable` is deprecated:FutureWarning")


@pytest.fixture
def model() -> PeftModel:
    return adapted(TwoLayers(), target_modules=TARGETS)


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
    vae.add_adapter(nara_config(target_modules=["conv1", "conv2", "to_q", "to_v"], noise_convention="mine"))
    disturb(vae)
    images = torch.randn(3, 3, 8, 8)
    with noise_level(vae, LEVELS), torch.no_grad():
        parts = vae.decode(vae.encode(images).latent_dist.mode()).sample
        whole = vae(images).sample
    assert torch.equal(parts, whole)
