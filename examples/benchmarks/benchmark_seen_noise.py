"""Whether the layers of both backbones see λ without reading it: how well one token's input predicts it, linearly.

    python examples/benchmarks/benchmark_seen_noise.py

    R² = 1 − Σ (λ − λ̂)² / Σ (λ − λ̄)²        on samples that the regression hasn't seen

λ̂ is ridge regression from x, the input of one token to one layer, which is all that LoRA's B A x has. Where R² is near
1, an update that is a function of x can already differ over λ, and C(λ) adds nothing. Without an adapter: llada-tiny
on masked validation questions, at a masked position of the answer; sdxl-tiny on noisy held-out pictures, at a pixel or,
in cross-attention's keys and values, a word of the prompt.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from benchmark_record import run_command, save_record
from matplotlib.figure import Figure
from quality.images.held_out import SUBJECTS, HeldOut, held_out_losses
from quality.images.task import load_task as load_subject
from quality.text.runs import load_task
from torch import Tensor, nn
from tqdm.auto import tqdm

from nara_diffusion.dllm.loss import masked_cross_entropy
from nara_diffusion.dllm.masking import MaskedBatch

RIDGE = 1e-2  # times the number of samples
A_BIN = 20  # pictures, as many as the smallest has, so that λ is uniform
IMAGE_LAYERS = {
    "self-attention": ("attn1.to_q", "attn1.to_k", "attn1.to_v", "attn1.to_out.0"),
    "cross-attention, queries": ("attn2.to_q",),
    "cross-attention, output": ("attn2.to_out.0",),
    "cross-attention, from words": ("attn2.to_k", "attn2.to_v"),
}
Forward = tuple[Callable[[], Tensor], Tensor]
"""A forward, which returns λ (b,); and the place (b,) in [0, 1) of the token to look at, −1 for none."""


def probe(modules: Mapping[str, nn.Module], forwards: Iterable[Forward]) -> dict[str, float]:
    """{name of a module: its R²}, from what `modules` are given in `forwards`."""
    noted: dict[str, list[Tensor]] = {name: [] for name in modules}
    levels: list[Tensor] = []
    places: list[Tensor] = []

    def note(module: nn.Module, inputs: tuple[Tensor, ...], name: str) -> None:
        x = inputs[0].detach().reshape(len(inputs[0]), -1, inputs[0].shape[-1])  # (b, l, d)
        token = (places[-1].clamp(min=0) * x.shape[1]).long()  # (b,)
        noted[name].append(x[torch.arange(len(x)), token].float())

    handles = [module.register_forward_pre_hook(partial(note, name=name)) for name, module in modules.items()]
    for forward, place in forwards:
        places.append(place)
        levels.append(forward())
    for handle in handles:
        handle.remove()
    chosen = (torch.cat(places) >= 0).nonzero().flatten()
    order = chosen[torch.randperm(len(chosen), generator=torch.Generator().manual_seed(0))]
    known = torch.cat(levels)[order]
    return {name: r_squared(torch.cat(own)[order], known) for name, own in noted.items()}


def r_squared(features: Tensor, levels: Tensor) -> float:
    """Of ridge regression (n, d) → (n,), fitted on two of three samples, on the third; by x = U S Vᵀ, since there may
    be more features than samples."""
    held_out = torch.arange(len(levels)) % 3 == 0
    x, y = features.double(), levels.double()
    mean, scale = x[~held_out].mean(0), x[~held_out].std(0).clamp(min=1e-8)
    x, y = (x - mean) / scale, y - y[~held_out].mean()
    u, s, vt = torch.linalg.svd(x[~held_out], full_matrices=False)
    weights = vt.T @ (s / (s.square() + RIDGE * len(u)) * (u.T @ y[~held_out]))  # (d,)
    around = y[held_out] - y[held_out].mean()
    return 1 - ((y[held_out] - x[held_out] @ weights).square().sum() / around.square().sum()).item()


def text_probe(domain: str) -> dict[str, dict[str, float]]:
    """{kind of layer: {layer: R²}} of llada-tiny."""
    task, generator = load_task("llada-tiny", domain), torch.Generator().manual_seed(0)

    @torch.no_grad()
    def forward(batch: MaskedBatch) -> Tensor:
        masked_cross_entropy(task.model, batch, chunk_size=None)
        return batch.noise_level

    def forwards() -> Iterator[Forward]:
        for batch in tqdm(task.validation.batches, desc="llada-tiny", unit="batch"):
            rank = torch.rand(batch.masked.shape, generator=generator).masked_fill(~batch.masked, -1)
            middle = (rank.argmax(1) + 0.5) / rank.shape[1]  # of one masked token, any of them
            yield partial(forward, batch), middle.where(batch.masked.any(1), -1.0)

    found = probe(_linears(task.model), forwards())
    kinds = list(dict.fromkeys(name.rpartition(".")[2] for name in found))
    return {kind: {name: r for name, r in found.items() if name.endswith(f".{kind}")} for kind in kinds}


def image_probe() -> dict[str, dict[str, float]]:
    """{kind of layer: {layer: R²}} of sdxl-tiny."""
    tasks, generator = [load_subject(subject) for subject in SUBJECTS], torch.Generator().manual_seed(0)
    unet, timesteps = tasks[0].pipe.unet, tasks[0].pipe.scheduler.config.num_train_timesteps

    def forward(held_out: HeldOut) -> Tensor:
        held_out_losses(unet, held_out)
        return held_out.batch.timestep / timesteps

    def forwards() -> Iterator[Forward]:
        for whole in tqdm([each for task in tasks for each in task.held_out], desc="sdxl-tiny", unit="batch"):
            rows = whole.rows(slice(None, None, len(whole.time_ids) // A_BIN))
            yield partial(forward, rows), torch.rand(len(rows.time_ids), generator=generator)

    ends = tuple(end for each in IMAGE_LAYERS.values() for end in each)
    found = probe({name: layer for name, layer in _linears(unet).items() if name.endswith(ends)}, forwards())
    return {kind: {name: r for name, r in found.items() if name.endswith(own)} for kind, own in IMAGE_LAYERS.items()}


def _linears(model: Any) -> dict[str, nn.Module]:
    """By name, in the order of the forward; but for the head, which adapters leave alone."""
    found = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    return {name: module for name, module in found.items() if name != "lm_head"}


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


def main(domain: str = "commonsense", output_dir: str = "outputs/benchmarks") -> dict[str, Any]:
    """Probes both, prints the span of each kind, writes record and picture; returns the figures."""
    figures = {"llada-tiny": text_probe(domain), "sdxl-tiny": image_probe()}
    for name, kinds in figures.items():
        for kind, layers in kinds.items():
            values = sorted(layers.values())
            print(f"{name}, {kind}: R² from {values[0]:.2f} to {values[-1]:.2f}, median {values[len(values) // 2]:.2f}")
    draw(figures, Path(output_dir) / "benchmark_seen_noise.png")
    print(f"saved to {save_record('benchmark_seen_noise', {'domain': domain, 'r_squared': figures}, output_dir)}")
    return figures


if __name__ == "__main__":
    run_command(main)
