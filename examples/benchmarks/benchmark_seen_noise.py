"""Looks whether the layers see λ without being told: from one token's input, at each depth, of both backbones.

    python examples/benchmarks/benchmark_seen_noise.py

The backbones as they are, without an adapter: llada-tiny on masked validation questions, at a masked position of the
answer; sdxl-tiny on noisy held-out pictures, at a pixel or, in cross-attention's keys and values, a word of the prompt.
Where R² is near 1 an ordinary LoRA can already act differently at each λ (see quality/probe.py). The
record holds all of it, with command, hardware, versions and commit; the picture shows it over the depth.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from benchmark_record import save_record
from matplotlib.figure import Figure
from quality.images.held_out import HeldOut, held_out_losses
from quality.images.subjects import SUBJECTS
from quality.images.task import ImageTask
from quality.images.task import load_task as load_subject
from quality.probe import Forward, masked_place, probe
from quality.text.runs import load_task
from torch import Tensor, nn
from tqdm.auto import tqdm

from nara_diffusion.dllm.loss import masked_cross_entropy
from nara_diffusion.dllm.masking import MaskedBatch

A_BIN = 20  # pictures, as many as the smallest has, so that λ is uniform
IMAGE_LAYERS = {
    "self-attention": ("attn1.to_q", "attn1.to_k", "attn1.to_v", "attn1.to_out.0"),
    "cross-attention, queries": ("attn2.to_q",),
    "cross-attention, output": ("attn2.to_out.0",),
    "cross-attention, from words": ("attn2.to_k", "attn2.to_v"),
}


def text_probe(domain: str) -> dict[str, dict[str, float]]:
    """{kind of layer: {layer: R²}} of llada-tiny."""
    task = load_task("llada-tiny", domain)
    found = probe(_linears(task.model), _text_forwards(task.model, task.validation.batches))
    kinds = list(dict.fromkeys(name.rpartition(".")[2] for name in found))
    return {kind: {name: r for name, r in found.items() if name.endswith(f".{kind}")} for kind in kinds}


def _text_forwards(model: nn.Module, batches: list[MaskedBatch]) -> Iterator[Forward]:
    generator = torch.Generator().manual_seed(0)
    for batch in tqdm(batches, desc="llada-tiny", unit="batch"):
        yield Forward(partial(_masked_levels, model, batch), masked_place(batch.masked, generator))


@torch.no_grad()
def _masked_levels(model: nn.Module, batch: MaskedBatch) -> Tensor:
    """λ (b,) of a forward."""
    masked_cross_entropy(model, batch, logits="all")
    return batch.noise_level


def image_probe() -> dict[str, dict[str, float]]:
    """{kind of layer: {layer: R²}} of sdxl-tiny."""
    tasks = [load_subject(subject) for subject in SUBJECTS]  # which runs the UNet: not while inputs are noted
    pipe = tasks[0].pipe
    unet = pipe.unet
    layers = _linears(unet)
    adapted = {name: layer for name, layer in layers.items() if _image_kind(name)}
    found = probe(adapted, _image_forwards(unet, tasks, pipe.scheduler.config.num_train_timesteps))
    return {kind: {name: r for name, r in found.items() if _image_kind(name) == kind} for kind in IMAGE_LAYERS}


def _image_kind(name: str) -> str | None:
    return next((kind for kind, ends in IMAGE_LAYERS.items() if name.endswith(ends)), None)


def _image_forwards(unet: nn.Module, tasks: Sequence[ImageTask], timesteps: int) -> Iterator[Forward]:
    generator = torch.Generator().manual_seed(0)
    for task in tqdm(tasks, desc="sdxl-tiny", unit="subject"):
        for whole in task.held_out:
            held_out = whole.rows(slice(None, None, len(whole.kinds) // A_BIN))
            place = torch.rand(len(held_out.kinds), generator=generator)
            yield Forward(partial(_noisy_levels, unet, held_out, timesteps), place)


def _noisy_levels(unet: nn.Module, held_out: HeldOut, timesteps: int) -> Tensor:
    """λ (b,) of a forward."""
    held_out_losses(unet, held_out)
    return held_out.batch.timestep / timesteps


def _linears(model: nn.Module) -> dict[str, nn.Module]:
    """By name, in the order of the forward; but for the head, which adapters leave alone."""
    found = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    return {name: module for name, module in found.items() if module is not _head(model)}


def _head(model: Any) -> Any:
    return model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None


def draw(figures: dict[str, dict[str, dict[str, float]]], path: Path) -> None:
    """One panel a backbone, one line a kind of layer, over the depth."""
    figure = Figure(figsize=(9, 3.6), layout="constrained")
    row = figure.subplots(1, len(figures), sharey=True)
    for axes, (name, kinds) in zip(row, figures.items(), strict=True):
        for kind, layers in kinds.items():
            places = [index / max(1, len(layers) - 1) for index in range(len(layers))]
            axes.plot(places, list(layers.values()), ".-", label=kind)
        axes.axhline(0, color="grey", linewidth=0.8)
        axes.set(title=name, xlabel="depth: first to last layer of its kind", ylim=(-0.15, 1.02))
        axes.legend(frameon=False, fontsize="small")
    row[0].set_ylabel("R² of λ from one token's input")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110, metadata={"Software": None})


def main(domain: str = "commonsense", output_dir: str | Path = "outputs/benchmarks") -> dict[str, Any]:
    """Probes both, prints the span of each kind, writes record and picture; returns the figures."""
    figures = {"llada-tiny": text_probe(domain), "sdxl-tiny": image_probe()}
    for name, kinds in figures.items():
        for kind, layers in kinds.items():
            values = list(layers.values())
            print(
                f"{name}, {kind}: R² {values[0]:.2f} in the first layer, {values[-1]:.2f} in the last; "
                f"from {min(values):.2f} to {max(values):.2f}, median {sorted(values)[len(values) // 2]:.2f}"
            )
    draw(figures, Path(output_dir) / "benchmark_seen_noise.png")
    print(f"saved to {save_record('benchmark_seen_noise', {'domain': domain, 'r_squared': figures}, output_dir)}")
    return figures


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--domain", default="commonsense", help="of the text benchmark (default: commonsense)")
    parser.add_argument("--output_dir", default="outputs/benchmarks", help="where record and picture go")
    main(**vars(parser.parse_args()))
