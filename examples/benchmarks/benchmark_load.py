"""How long loading a NaRA takes beside a LoRA of the same rank, and whether swapping adapters leaves memory behind.

    python examples/benchmarks/benchmark_load.py

A UNet of SDXL's depth (560 adapted projections) and smaller width. The two files are loaded in turn into one pipeline,
each after the other has been unloaded; a ratio is the median of the rounds' ratios. Then NaRAs of two ranks take each
other's place, and tensors and resident memory are counted.
"""

from __future__ import annotations

import gc
import statistics
import tempfile
from pathlib import Path
from typing import Any

import torch
from benchmark_record import median_ratio, run_command, save_record, times_in_turn
from diffusers import DDIMScheduler, StableDiffusionXLPipeline, UNet2DConditionModel
from diffusers.utils import logging
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict
from torch._subclasses.fake_tensor import FakeTensor

from nara_diffusion import NaraConfig

SDXL: dict[str, Any] = {
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "transformer_layers_per_block": (1, 2, 10),
    "block_out_channels": (32, 64, 128),
    "attention_head_dim": (2, 4, 8),
    "cross_attention_dim": 128,
    "use_linear_projection": True,
}
TARGETS = ["to_q", "to_k", "to_v", "to_out.0"]


def pipeline(**unet: Any) -> StableDiffusionXLPipeline:
    """SDXL's pipeline around a random UNet; what else it has is not needed to load adapters."""
    torch.manual_seed(0)
    absent = dict.fromkeys(("vae", "text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2"))
    model = UNet2DConditionModel(**{**SDXL, **unet})
    return StableDiffusionXLPipeline(unet=model, scheduler=DDIMScheduler(), add_watermarker=False, **absent)


def disturb(pipe: StableDiffusionXLPipeline) -> None:
    for name, parameter in pipe.unet.named_parameters():
        if "lora_" in name or "nara_core" in name:
            parameter.data.normal_(std=0.01)


def save_adapters(folder: Path, rank: int, **unet: Any) -> dict[str, Path]:
    """Files of a LoRA, a NaRA, and a NaRA of twice the rank."""
    files = {}
    for name, config in {
        "LoRA": LoraConfig(r=rank, target_modules=TARGETS),
        "NaRA": NaraConfig(r=rank, target_modules=TARGETS),
        "larger": NaraConfig(r=2 * rank, target_modules=TARGETS),
    }.items():
        pipe = pipeline(**unet)
        pipe.unet.add_adapter(config)
        disturb(pipe)
        files[name] = folder / name / "weights.safetensors"
        if isinstance(config, NaraConfig):
            pipe.save_nara_weights(files[name].parent, weight_name=files[name].name)
        else:
            layers = get_peft_model_state_dict(pipe.unet)
            pipe.save_lora_weights(files[name].parent, unet_lora_layers=layers, weight_name=files[name].name)
    return files


def measure(pipe: StableDiffusionXLPipeline, files: dict[str, Path], rounds: int) -> dict[str, list[float]]:
    """Seconds of each load and of the unload after it."""

    def load_lora() -> None:
        pipe.load_lora_weights(files["LoRA"].parent, weight_name=files["LoRA"].name)
        pipe.unload_lora_weights()

    def load_nara() -> None:
        pipe.load_nara_weights(files["NaRA"])
        pipe.unload_lora_weights()

    return times_in_turn({"LoRA": load_lora, "NaRA": load_nara}, rounds)


def memory() -> dict[str, int]:
    """Tensors alive, their bytes, and the process's resident memory, which only Linux tells."""
    gc.collect()
    tensors = [thing for thing in gc.get_objects() if issubclass(type(thing), torch.Tensor)]
    tensors = [tensor for tensor in tensors if not issubclass(type(tensor), FakeTensor)]  # a compiler's, without memory
    storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in tensors}
    statm = Path("/proc/self/statm")
    resident = int(statm.read_text().split()[1]) * 4096 if statm.exists() else 0
    return {"tensors": len(tensors), "bytes": sum(storages.values()), "resident": resident}


def swap(pipe: StableDiffusionXLPipeline, files: dict[str, Path], swaps: int) -> dict[str, dict[str, int]]:
    """Memory before and after `swaps` loads, each of which takes the place of the adapter before."""
    states = {}
    names = ["NaRA", "larger"]
    for number in range(swaps + 3):
        if number == 3:  # the allocator has seen both by now
            states["before"] = memory()
        pipe.load_nara_weights(files[names[number % 2]], adapter_name="swapped")
        pipe.delete_adapters("swapped")
    states["after"] = memory()
    return states


def main(
    rounds: int = 15, rank: int = 16, swaps: int = 50, output_dir: str = "outputs/benchmarks", **unet: Any
) -> dict[str, Any]:
    """Time both loads `rounds` times and swap `swaps` times; print the figures, save them as JSON, return them."""
    logging.set_verbosity_error()  # Diffusers warns at every load that a LoRA has nothing for absent text encoders
    with tempfile.TemporaryDirectory() as folder:
        files = save_adapters(Path(folder), rank, **unet)
        pipe = pipeline(**unet)
        times = measure(pipe, files, rounds)
        states = swap(pipe, files, swaps)
    medians = {name: statistics.median(values) for name, values in times.items()}
    figures = {"rank": rank, "rounds": rounds, "seconds": medians, "swaps": swaps, "memory": states}
    figures["ratio"] = median_ratio(times["NaRA"], times["LoRA"])
    for name, median in medians.items():
        print(f"{name}: {1e3 * median:.0f} ms a load and unload")
    for kind, before in states["before"].items():
        print(f"{kind} before and after {swaps} swaps: {before:,} and {states['after'][kind]:,}")
    print(f"NaRA / LoRA: {figures['ratio']:.3f}")
    print(f"saved to {save_record('benchmark_load', figures, output_dir)}")
    return figures


if __name__ == "__main__":
    run_command(main)
