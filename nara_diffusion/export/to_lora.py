"""Export a NaRA as one plain LoRA, with its exact update at one λ or the nearest over all λ.

The LoRA that is nearest over all λ uses the mean C̄ of C(λ) in place of C(λ). For any A and B, C̄ is
the X that minimises ∫ ‖s B (C(λ) − X) A‖² dλ. The error is computed from r × r matrices, without
the dense ΔW (d_out, d_in):

    ‖s B D A‖² = Σ (Bᵀ B D s² A Aᵀ) ⊙ D,        D = C(λ) − C̄

The grid of λ has 257 equidistant points, plus every point where C(λ) bends or jumps. These are the
knots of "knots" and the points of a strength schedule. At each jump of a schedule, the grid has a
point on either side (neighbouring float32 numbers).
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any, Literal

import torch
from torch import Tensor, nn

from nara_diffusion.config import NaraConfig
from nara_diffusion.cores.registry import needs_noise
from nara_diffusion.noise.level import Level, as_level

from .adapter_factors import Adapter, adapter_of_model
from .plain_lora import ExportError, PlainLora, PlainLoraLayer


def to_lora(
    model: nn.Module,
    noise_level: Level | Literal["best"] | None = None,
    adapter_name: str = "default",
) -> PlainLora:
    """Return the adapter of `model` at one λ as a plain LoRA, or a DoRA if it is a NaRA-DoRA.

    The model is not changed.

        to_lora(model, noise_level=0.5).save_pretrained("folder")      # for PeftModel.from_pretrained, without NaRA

    At that λ, the update equals the NaRA's up to rounding (a relative error of 1e-7 in float32). At
    any other λ, the two differ. The export includes a strength from `set_strength` or from the
    configuration. Every `core_type` and `core_sharing` can be exported. So can a plain LoRA with a
    strength over λ.

    Args:
        model: a PeftModel, a model with an injected adapter (`inject_adapter_in_model`,
            `unet.add_adapter`, `load_nara_weights`), or a model that contains one of these. It may
            be quantised.
        noise_level: λ in [0, 1], 1 = pure noise. None means the λ of `with noise_level(model, …)`;
            an adapter that doesn't depend on λ needs no λ. "best" returns the LoRA with the nearest
            update over all λ, together with its `error`, for programs without schedules. For a
            DoRA, the updates inside the norm are compared.
        adapter_name: the name of the adapter.

    Raises:
        ValueError: there is no such adapter; λ is missing, or differs between samples; a plain LoRA
            can't express the adapter (a variant such as aLoRA, a method other than LoRA, biases of
            B); or the weights are offloaded or sharded.
    """
    if isinstance(noise_level, str) and noise_level != "best":
        raise ValueError(f'noise_level is {noise_level!r}. Pass a number in [0, 1], or "best".')
    if noise_level is not None and not isinstance(noise_level, str):
        as_level(noise_level)  # a λ out of range is an error even if the adapter needs no λ
    with adapter_of_model(model, adapter_name) as adapter:
        return lora_of(adapter, noise_level)


def lora_of(adapter: Adapter, noise_level: Level | Literal["best"] | None) -> PlainLora:
    """Return a plain LoRA as `to_lora` does, for an adapter from a model or a file."""
    config = adapter.config
    few_steps = config.few_steps if isinstance(config, NaraConfig) and needs_noise(config) else None
    number = 1 if few_steps is None else few_steps["num_inference_steps"]
    if number > 1:
        raise ValueError(
            f"The adapter samples in {number} steps, and its update differs from step to step, so a LoRA for one λ "
            "would be right in only one of them. Load it with pipe.load_nara_weights."
        )
    if isinstance(noise_level, str):
        cores, error = _nearest(adapter)
        return replace(adapter.folded(cores), error=error)
    at_level = adapter.cores(adapter.level_of(noise_level))
    return adapter.folded({name: C[0] for name, C in at_level.items()})


_GRID = 257


def _nearest(adapter: Adapter) -> tuple[dict[str, Tensor], ExportError]:
    """Return {module: the mean C̄ (r, r) of C(λ)}, float64, and the export's error over λ."""
    levels = _grid(adapter)
    # the weights (n,) of the trapezoidal rule, with the sum 1
    half, zero = levels.double().diff() / 2, torch.zeros(1, dtype=torch.float64)
    weights = torch.cat([half, zero]) + torch.cat([zero, half])
    means: dict[str, Tensor] = {}
    errors = sizes = torch.zeros(len(levels), dtype=torch.float64)
    for name, core in adapter.cores(levels).items():
        C = core.double().expand(len(levels), -1, -1)
        means[name] = torch.einsum("n,nrs->rs", weights, C)
        layer = adapter.lora.layers[name]
        errors = errors + _squared_norms(layer, C - means[name])
        sizes = sizes + _squared_norms(layer, C)
    unit = (weights * sizes).sum().sqrt()
    relative = errors.sqrt() / unit if unit else torch.zeros_like(errors)
    return means, ExportError(levels.tolist(), weights.tolist(), relative.tolist())


def _squared_norms(layer: PlainLoraLayer, D: Tensor) -> Tensor:
    """Return ‖s B D A‖² (n,) for D (n, r, r)."""
    A, B = layer.A.double().flatten(1), layer.B.double().flatten(1)
    if B.shape[1] != layer.rank:
        B = torch.block_diag(*B.chunk(layer.groups))
    products = B.T @ B @ D @ (layer.scaling**2 * A @ A.T)
    return (products * D).sum((1, 2)).clamp(min=0)


def _grid(adapter: Adapter) -> Tensor:
    """Return λ (n,), ascending, float32: equidistant points, and where C(λ) bends or jumps."""
    config: Any = adapter.config
    levels = [torch.linspace(0, 1, _GRID, dtype=torch.float32)]
    if adapter.schedule is not None:
        points = torch.tensor([level for level, _ in adapter.schedule.points], dtype=torch.float32)
        jumps = points[1:][points.diff() == 0]
        levels += [points, jumps.nextafter(torch.zeros_like(jumps))]
    if getattr(config, "core_type", None) == "knots":
        knots = torch.arange(config.core_knots, dtype=torch.float32)
        levels.append(knots / (config.core_knots - 1))
    return torch.cat(levels).unique()
