"""LyCORIS itself on the shipped tiny SDXL: what `nara convert` writes, and what it trains as SimpleTuner does."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import StableDiffusionXLPipeline
from peft import inject_adapter_in_model
from torch import Tensor, nn

import nara_command
from nara_diffusion import NaraConfig
from tests.helpers.adapted import relative_error

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]  # LyCORIS' own warnings
SDXL = Path(__file__).parents[2] / "examples/assets/sdxl-tiny"
TIMESTEPS = (0, 1, 250, 251, 600, 999)


def pipeline() -> Any:
    return StableDiffusionXLPipeline.from_pretrained(SDXL)


def inputs(unet: Any, batch: int = 2) -> dict[str, Any]:
    config, generator = unet.config, torch.Generator().manual_seed(0)
    pooled = config.projection_class_embeddings_input_dim - 6 * config.addition_time_embed_dim
    size = config.sample_size
    return {
        "sample": torch.randn(batch, config.in_channels, size, size, generator=generator),
        "encoder_hidden_states": torch.randn(batch, 5, config.cross_attention_dim, generator=generator),
        "added_cond_kwargs": {
            "text_embeds": torch.randn(batch, pooled, generator=generator),
            "time_ids": torch.tensor([[64.0, 64, 0, 0, 64, 64]]).expand(batch, -1),
        },
    }


@contextmanager
def mask(timestep: int, settings: dict[str, Any]) -> Iterator[None]:
    """LyCORIS' mask, which is global, as SimpleTuner sets it."""
    from lycoris.modules.tlora import clear_timestep_mask, compute_timestep_mask, set_timestep_mask

    fields = (settings["linear_dim"], settings["tlora_min_rank"], settings["tlora_alpha"])
    set_timestep_mask(compute_timestep_mask(timestep, 1000, *fields))
    try:
        yield
    finally:
        clear_timestep_mask()


def predictions(unet: nn.Module, settings: dict[str, Any]) -> list[Tensor]:
    outputs = []
    for timestep in TIMESTEPS:
        with mask(timestep, settings), torch.no_grad():
            outputs.append(unet(timestep=timestep, **inputs(unet)).sample)
    return outputs


def test_lycoris_plays_what_convert_writes(tmp_path: Path) -> None:
    from lycoris import create_lycoris_from_weights

    pipe, theirs = pipeline(), pipeline().unet
    config = NaraConfig(
        core_type="rank_mask", r=14, lora_alpha=10, rank_mask_min=2, rank_mask_step=2, rank_mask_exponent=0.5,
        lora_a_init="residual_base", target_modules=["to_q", "to_v", "to_out.0", "proj_in"],
    )  # fmt: skip
    inject_adapter_in_model(config, pipe.unet, "toy")
    for name, parameter in pipe.unet.named_parameters():
        if ".lora_" in name:
            rows = parameter.data if ".lora_A." in name else parameter.data.T
            rows[0::2] += 0.1 * torch.randn_like(rows[0::2])
    pipe.save_nara_weights(tmp_path / "ours", adapter_name="toy")
    nara_command.main(["convert", str(tmp_path / "ours"), str(tmp_path / "theirs"), "--form", "lycoris"])
    settings = json.loads((tmp_path / "theirs/lycoris_config.json").read_text())
    with torch.no_grad():
        base = theirs(timestep=600, **inputs(theirs)).sample
    network, _ = create_lycoris_from_weights(1.0, str(tmp_path / "theirs/pytorch_lora_weights.safetensors"), theirs)
    assert len(network.loras) == sum(".lora_A." in name for name, _ in pipe.unet.named_parameters())
    network.apply_to()
    network.eval()
    expected = predictions(theirs, settings)
    assert relative_error(expected[4], base) > 0.01
    again = pipeline()
    again.load_nara_weights(tmp_path / "theirs/pytorch_lora_weights.safetensors")
    for unet in (pipe.unet, again.unet):
        for output, other in zip(predictions(unet, settings), expected, strict=True):
            assert relative_error(output, other) < 1e-4


def test_tlora_of_lycoris_plays_in_stock_pipeline(tmp_path: Path) -> None:
    from lycoris import LycorisNetwork, create_lycoris

    unet, settings = pipeline().unet, {"algo": "tlora", "linear_dim": 6, "linear_alpha": 4}
    settings |= {"tlora_min_rank": 1, "tlora_alpha": 1.0}
    preset = {"target_module": ["Attention", "FeedForward"]}
    LycorisNetwork.apply_preset(preset)
    torch.manual_seed(0)
    network = create_lycoris(unet.requires_grad_(False), 1.0, linear_dim=6, linear_alpha=4, algo="tlora")
    network.apply_to()
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-2)
    generator = torch.Generator().manual_seed(0)
    for _ in range(60):
        timestep = int(torch.randint(1000, (), generator=generator))
        batch = inputs(unet)
        with mask(timestep, settings):
            loss = (unet(timestep=timestep, **batch).sample - batch["sample"].roll(1, 2)).square().mean()
            loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    network.eval()
    expected = predictions(unet, settings)
    network.save_weights(str(tmp_path / "pytorch_lora_weights.safetensors"), torch.float32, {})
    (tmp_path / "lycoris_config.json").write_text(json.dumps({**settings, "apply_preset": preset}))

    pipe = pipeline()
    base = predictions(pipe.unet, settings)
    pipe.load_nara_weights(tmp_path / "pytorch_lora_weights.safetensors")
    for timestep, output, other in zip(TIMESTEPS, predictions(pipe.unet, settings), expected, strict=True):
        assert relative_error(output, other) < 1e-4, timestep
    assert relative_error(expected[2], base[2]) > 0.05
    call = {"prompt": "a toy", "num_inference_steps": 3, "output_type": "latent", "height": 64, "width": 64}
    images = pipe(**call, generator=torch.Generator().manual_seed(0)).images
    steps = iter(pipe.scheduler.timesteps.tolist())
    stock = pipeline()
    stock.unet = unet
    unet.register_forward_pre_hook(lambda *args: _set(next(steps), settings))
    by_lycoris = stock(**call, generator=torch.Generator().manual_seed(0)).images
    assert relative_error(images, by_lycoris) < 1e-3


def _set(timestep: float, settings: dict[str, Any]) -> None:
    from lycoris.modules.tlora import compute_timestep_mask, set_timestep_mask

    fields = (settings["linear_dim"], settings["tlora_min_rank"], settings["tlora_alpha"])
    set_timestep_mask(compute_timestep_mask(int(timestep), 1000, *fields))


def test_lycoris_finds_comfyuis_modules_as_node_does(tmp_path: Path) -> None:
    from lycoris import create_lycoris_from_weights

    pipe = pipeline()
    theirs = "mid_block.attentions.0.transformer_blocks.0.attn2.to_k"
    config = NaraConfig(
        core_type="rank_mask", r=8, lora_alpha=8, rank_mask_min=2, rank_mask_step=2, lora_a_init="residual_base",
        target_modules=theirs,
    )  # fmt: skip
    original = pipe.unet.get_submodule(theirs)
    comfyui = nn.Module()  # its `diffusion_model`, as far as the adapter needs it
    parent = comfyui
    for name in ["middle_block", "1", "transformer_blocks", "0", "attn2"]:
        parent.add_module(name, nn.Module())
        parent = getattr(parent, name)
    parent.add_module("to_k", original)
    inject_adapter_in_model(config, pipe.unet, "toy")
    pipe.save_nara_weights(tmp_path / "ours", adapter_name="toy")
    nara_command.main(
        ["convert", str(tmp_path / "ours"), str(tmp_path / "theirs"), "--to", "lycoris", "--base", "sdxl"]
    )
    network, _ = create_lycoris_from_weights(1.0, str(tmp_path / "theirs/pytorch_lora_weights.safetensors"), comfyui)
    (module,) = network.loras
    assert module.org_module[0] is original
    update, _ = module.get_diff_weight()
    assert update.abs().max() < 1e-5 * original.weight.abs().max()  # it hasn't been trained
