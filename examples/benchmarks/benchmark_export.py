"""Measures what a NaRA loses as one plain LoRA, and as several, on the shipped models.

    python examples/benchmarks/benchmark_export.py

In eight adapters A, B and the core's last weights are random, so that C(λ) is farther from I than training was seen to
bring it; the ninth, toy-nara, is trained. Noted are: the error of `to_lora` at a λ, against dense matrices in float64;
of "best", the one LoRA that is nearest over all λ; of to_lora_bins with 2, 4, 8 and 16 LoRAs; and of the NaRA's samples
at the same λ. Errors of ΔW are in units of its root mean square over λ.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from benchmark_record import run_command, save_record
from diffusers import StableDiffusionXLPipeline
from peft import inject_adapter_in_model
from torch import Tensor, nn

from nara_diffusion import NaraConfig, core_matrix, to_lora, to_lora_bins
from nara_diffusion.dllm import load_backbone
from nara_diffusion.export import LoraBins

ASSETS = Path(__file__).parents[1] / "assets"
CORES: dict[str, dict[str, Any]] = {
    "NaRA": {},
    "knots": {"core_type": "knots", "core_knots": 5},
    "Multi-LoRA": {"core_type": "bins", "core_bins": 4},
    "T-LoRA": {"core_type": "rank_mask"},
}
LEVELS = (0.05, 0.35, 0.65, 0.95)


def disturb(model: nn.Module, seed: int) -> None:
    """Random A and B; the core's last weights random, of a size at which ‖C(λ) − I‖ / √r is 0.5 in the mean over λ."""
    generator = torch.Generator().manual_seed(seed)
    last = []
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data = 0.05 * torch.randn(parameter.shape, generator=generator)
        elif "nara_core" in name and parameter.dim() > 1 and not parameter.any():
            parameter.data = torch.randn(parameter.shape, generator=generator)
            last.append(parameter)
    scale = 0.5 / distance(core_matrix(model, torch.linspace(0, 1, 101)))
    for parameter in last:
        parameter.data *= scale


@torch.no_grad()
def distance(cores: Tensor, around: Tensor | None = None) -> float:
    """The mean of ‖C − around‖ / √r, or of ‖C − I‖ / √r."""
    rank = cores.shape[-1]
    around = torch.eye(rank) if around is None else around
    return float((cores - around).norm(dim=(1, 2)).mean() / rank**0.5)


def text_model(options: dict[str, Any]) -> nn.Module:
    """llada-tiny with an adapter on all linear layers."""
    model, _ = load_backbone(str(ASSETS / "llada-tiny"))
    names = [name for name, module in model.named_modules() if isinstance(module, nn.Linear) and name != "lm_head"]
    inject_adapter_in_model(NaraConfig(r=8, lora_alpha=8, target_modules=names, **options), model)
    return model


def image_model(options: dict[str, Any]) -> nn.Module:
    """The UNet of sdxl-tiny with an adapter on attention and the first convolutions of its blocks."""
    unet: Any = StableDiffusionXLPipeline.from_pretrained(str(ASSETS / "sdxl-tiny")).unet
    targets = ["to_q", "to_k", "to_v", "to_out.0", "conv1"]
    unet.add_adapter(NaraConfig(r=8, lora_alpha=8, target_modules=targets, **options))
    return unet


def trained_model(_: dict[str, Any]) -> nn.Module:
    """The UNet of sdxl-tiny with the adapter that was trained on it."""
    pipe: Any = StableDiffusionXLPipeline.from_pretrained(str(ASSETS / "sdxl-tiny"))
    pipe.load_nara_weights(str(ASSETS / "toy-nara"), adapter_name="default")
    return pipe.unet


@torch.no_grad()
def exact_error(model: Any) -> float:
    """The largest |ΔW of `to_lora` − ΔW|, relative to the largest |ΔW|, over layers and λ, by dense float64."""
    worst = 0.0
    layers = {name: module for name, module in model.named_modules() if "lora_A" in module._modules}
    for level in LEVELS:
        lora = to_lora(model, level)
        for name, layer in layers.items():
            A, B = (getattr(layer, f"lora_{kind}")["default"].weight.double().flatten(1) for kind in "AB")
            C = core_matrix(model, level, module=name)[0].double()
            expected, part = layer.scaling["default"] * B @ C @ A, lora.layers[name]
            found = part.scaling * part.B.double().flatten(1) @ part.A.double().flatten(1)
            worst = max(worst, float((found - expected).abs().max() / expected.abs().max()))
    return worst


@torch.no_grad()
def error_of_samples(model: Any, bins: LoraBins) -> float:
    """The mean error of ΔW where each LoRA is the NaRA at its λ, with the strengths of `bins`."""
    levels = torch.linspace(0, 1, 257)
    shares = torch.stack([schedule(levels) for schedule in bins.schedules], dim=1)
    layers = {name: module for name, module in model.named_modules() if "lora_A" in module._modules}
    errors, sizes = torch.zeros(257), torch.zeros(257)
    for name, layer in layers.items():
        A, B = (getattr(layer, f"lora_{kind}")["default"].weight.flatten(1) for kind in "AB")
        C = core_matrix(model, levels, module=name)
        samples = core_matrix(model, torch.tensor(bins.noise_levels), module=name)
        played = torch.einsum("nk,krs->nrs", shares, samples)
        errors += (layer.scaling["default"] * B @ (played - C) @ A).square().sum((1, 2))
        sizes += (layer.scaling["default"] * B @ C @ A).square().sum((1, 2))
    return float((errors.mean() / sizes.mean()).sqrt())


def measure(model: nn.Module, counts: Sequence[int]) -> dict[str, Any]:
    """All figures of one adapter."""
    best = to_lora(model, "best").error
    assert best is not None
    cores = core_matrix(model, torch.linspace(0, 1, 101))
    found: dict[str, Any] = {
        "distance of C from I": distance(cores),
        "spread of C over λ": distance(cores, cores.mean(0)),
        "exact": exact_error(model),
        "best": {"mean": best.mean_update, "worst": best.worst_update},
        "bins": {},
    }
    for count in counts:
        bins = to_lora_bins(model, count)
        found["bins"][str(len(bins.loras))] = {
            "mean update": bins.error.mean_update,
            "worst update": bins.error.worst_update,
            "samples, mean update": error_of_samples(model, bins),
        }
    return found


def main(
    counts: Sequence[int] = (2, 4, 8, 16), cores: Sequence[str] = tuple(CORES), output_dir: str = "outputs"
) -> dict[str, Any]:
    figures: dict[str, Any] = {}
    cases = [
        (f"{title}, {name}", make, CORES[name], True)
        for title, make in (("llada-tiny", text_model), ("sdxl-tiny", image_model))
        for name in cores
    ]
    for title, make, options, disturbed in [*cases, ("sdxl-tiny, toy-nara", trained_model, {}, False)]:
        torch.manual_seed(0)
        model = make(options)
        model.eval()
        if disturbed:
            disturb(model, 1)
        figures[title] = found = measure(model, counts)
        print(f"{title}: {found}")
    save_record("benchmark_export", {"figures": figures}, output_dir)
    return figures


if __name__ == "__main__":
    run_command(main)
