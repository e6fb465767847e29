"""The node *Load NaRA* in ComfyUI itself, on a small SDXL UNet: what its sampler gets is what Diffusers computes.

    python examples/check_comfyui.py --comfyui ~/ComfyUI

ComfyUI loads the node as it loads any custom node, and samples by its KSampler node (Euler, guidance, two images).
Each call of the model is repeated in Diffusers at the same timesteps, and the two outputs are compared. The same is
done with a LoRA that `to_lora` made at one λ, by ComfyUI's own *Load LoRA*.
Runs in a Python that has both ComfyUI's requirements and this package, without a GPU.
"""

from __future__ import annotations

import argparse
import asyncio
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

CONFIG = {
    "sample_size": 16,
    "block_out_channels": (64, 128, 192),
    "layers_per_block": 2,
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "transformer_layers_per_block": (1, 2, 3),
    "attention_head_dim": (1, 2, 3),
    "cross_attention_dim": 48,
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 40 + 6 * 256,
}
"""Diffusers' UNet: SDXL's blocks, smaller."""
COMFYUI_CONFIG = {
    "image_size": 32,
    "in_channels": 4,
    "out_channels": 4,
    "model_channels": 64,
    "num_res_blocks": [2, 2, 2],
    "channel_mult": [1, 2, 3],
    "transformer_depth": [0, 0, 2, 2, 3, 3],
    "transformer_depth_middle": 3,
    "transformer_depth_output": [0, 0, 0, 2, 2, 2, 3, 3, 3],
    "use_spatial_transformer": True,
    "use_linear_in_transformer": True,
    "legacy": False,
    "num_head_channels": 64,
    "context_dim": 48,
    "num_classes": "sequential",
    "adm_in_channels": 40 + 6 * 256,
    "use_temporal_attention": False,
    "use_temporal_resblock": False,
    "dtype": torch.float32,
}
"""The same UNet by ComfyUI's names of options."""
NAME, FOLDED = "nara.safetensors", "folded.safetensors"
TIME_IDS = (128.0, 128.0, 0.0, 0.0, 128.0, 128.0)
"""What ComfyUI takes for latents of 16 × 16: height, width, crop, target height and width."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--comfyui", type=Path, required=True, help="the folder of ComfyUI's main.py")
    comfyui = parser.parse_args().comfyui.resolve()
    torch.manual_seed(0)
    pipe = small_pipeline()
    with tempfile.TemporaryDirectory() as folder:
        write_adapters(pipe, Path(folder))
        nodes = start_comfyui(comfyui, Path(folder))
        model = model_of_comfyui(pipe.unet)
        compare("no adapter", sampled_calls(nodes, model), pipe.unet)
        (nara,) = nodes.NODE_CLASS_MAPPINGS["LoadNaRA"]().load(model, NAME, "sdxl", 1.0)[:1]
        (lora,) = nodes.LoraLoaderModelOnly().load_lora_model_only(model, FOLDED, 1.0)
        nara_calls, lora_calls = sampled_calls(nodes, nara), sampled_calls(nodes, lora)
        pipe.load_nara_weights(Path(folder) / NAME)
        compare("Load NaRA", nara_calls, pipe.unet)
        compare("Load LoRA, made at λ = 0.4", lora_calls, pipe.unet, level=0.4)
        difference = (nara_calls[0][1] - lora_calls[0][1]).abs().max()
        print(f"the first call with λ and at λ = 0.4: {difference:.1e} apart; ComfyUI {comfyui_version(comfyui)}")


def comfyui_version(comfyui: Path) -> str:
    return (comfyui / "comfyui_version.py").read_text().split('"')[-2]


def small_pipeline() -> Any:
    """SDXL's pipeline with a random UNet, and without text encoders."""
    from diffusers import AutoencoderKL, EulerDiscreteScheduler, StableDiffusionXLPipeline, UNet2DConditionModel

    encoders = dict.fromkeys(("text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2"))
    autoencoder = AutoencoderKL(block_out_channels=(32,), latent_channels=4)
    return StableDiffusionXLPipeline(
        vae=autoencoder, unet=UNet2DConditionModel(**CONFIG).eval(), scheduler=EulerDiscreteScheduler(), **encoders
    )


def write_adapters(pipe: Any, folder: Path) -> None:
    """A NaRA with random weights and a LoRA made of it, as ComfyUI takes them; `pipe` is left without."""
    import nara_diffusion
    from nara_command import main as nara

    layers = ["to_q", "to_k", "to_v", "to_out.0", "ff.net.0.proj", "ff.net.2", "proj_in", "conv1", "time_emb_proj"]
    pipe.unet.add_adapter(nara_diffusion.NaraConfig(r=4, lora_alpha=8, target_modules=layers))
    with torch.no_grad():
        for name, weight in pipe.unet.named_parameters():
            if "lora_" in name:
                weight.normal_(0, 0.05)
    pipe.save_nara_weights(folder / "saved")
    (folder / "saved" / "pytorch_nara_weights.safetensors").rename(folder / NAME)
    pipe.unload_lora_weights()
    nara(
        [
            "fold",
            str(folder / NAME),
            str(folder / FOLDED),
            "--noise_level",
            "0.4",
            "--form",
            "comfyui",
            "--base",
            "sdxl",
        ]
    )


def start_comfyui(comfyui: Path, loras: Path) -> Any:
    """ComfyUI's module `nodes`, with this repository's node loaded and `loras` among its folders."""
    sys.argv = [sys.argv[0], "--cpu"]
    sys.path.insert(0, str(comfyui))
    import comfy.options  # type: ignore[import-not-found]

    comfy.options.enable_args_parsing()
    import folder_paths  # type: ignore[import-not-found]
    import nodes  # type: ignore[import-not-found]

    folder_paths.add_model_folder_path("loras", str(loras), is_default=True)
    if not asyncio.run(nodes.load_custom_node(str(Path(__file__).parents[1] / "comfyui"))):
        raise SystemExit("ComfyUI couldn't load the node: see its message above.")
    return nodes


def model_of_comfyui(unet: nn.Module) -> Any:
    """ComfyUI's own SDXL model with the weights of Diffusers' `unet`."""
    import comfy.model_patcher  # type: ignore[import-not-found]
    import comfy.supported_models  # type: ignore[import-not-found]
    import comfy.utils  # type: ignore[import-not-found]

    names = comfy.utils.unet_to_diffusers(COMFYUI_CONFIG)
    weights = {names[name]: weight.detach().clone() for name, weight in unet.state_dict().items()}
    model = comfy.supported_models.SDXL(dict(COMFYUI_CONFIG)).get_model({}, device="cpu")
    model.diffusion_model.load_state_dict(weights)
    device = torch.device("cpu")
    return comfy.model_patcher.ModelPatcher(model, load_device=device, offload_device=device)


def sampled_calls(nodes: Any, patcher: Any) -> list[tuple[dict[str, Tensor], Tensor]]:
    """(inputs, output) of each call of the UNet while ComfyUI's KSampler draws two images in five steps."""
    calls = []

    def record(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor) -> None:
        arguments = dict(zip(("x", "timesteps", "context", "y"), args, strict=False)) | kwargs
        calls.append(({name: arguments[name].clone() for name in ("x", "timesteps", "context", "y")}, output.clone()))

    draw = torch.Generator().manual_seed(1)
    positive, negative = (
        [[torch.randn(1, 7, 48, generator=draw), {"pooled_output": torch.randn(1, 40, generator=draw)}]]
        for _ in range(2)
    )
    handle = patcher.model.diffusion_model.register_forward_hook(record, with_kwargs=True)
    try:
        latent = {"samples": torch.zeros(2, 4, 16, 16)}
        nodes.KSampler().sample(patcher, 3, 5, 4.0, "euler", "karras", positive, negative, latent)
    finally:
        handle.remove()
    return calls


def compare(
    title: str, calls: list[tuple[dict[str, Tensor], Tensor]], unet: nn.Module, level: float | None = None
) -> None:
    """Repeats the calls in Diffusers, at λ = `level` if one is given, and prints the largest difference.

    Raises:
        SystemExit: it is more than rounding.
    """
    from contextlib import nullcontext

    from nara_diffusion import noise_level

    worst = 0.0
    for arguments, output in calls:
        rows = len(arguments["x"])
        added = {"text_embeds": arguments["y"][:, :40], "time_ids": torch.tensor([TIME_IDS]).expand(rows, -1)}
        with torch.no_grad(), noise_level(unet, level) if level is not None else nullcontext():
            expected = unet(
                arguments["x"], arguments["timesteps"], arguments["context"], added_cond_kwargs=added
            ).sample
        worst = max(worst, float((expected - output).abs().max() / output.abs().max()))
    timesteps = [round(float(arguments["timesteps"][0])) for arguments, _ in calls]
    print(f"{title}: {len(calls)} calls of {rows} rows at t = {timesteps}, largest relative difference {worst:.1e}")
    if not worst < 1e-5:
        raise SystemExit(f"{title}: ComfyUI and Diffusers differ.")


if __name__ == "__main__":
    main()
