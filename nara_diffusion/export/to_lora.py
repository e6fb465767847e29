"""Export of a NaRA as one plain LoRA: exactly that of one λ, or the nearest over all λ.

The one LoRA that is nearest over all λ has the mean of C(λ) in place of C(λ): of all X it minimises
∫ ‖s B (C(λ) − X) A‖² dλ, whatever A and B are. Its error, and that of K fixed cores with strengths φ_k over λ,

    ΔW(λ) ≈ Σ_k φ_k(λ) s B C_k A,        C_k = Σ_i T_ki C(λ_i),

follows from the inner products M_ij = ⟨ΔW(λ_i), ΔW(λ_j)⟩ alone: with Φ_ik = φ_k(λ_i) and E = 1 − Φ T, the squared error
at λ_i is (E M Eᵀ)_ii. M is computed from r × r matrices, so the dense ΔW (d_out, d_in) is never made:

    ⟨s B C A, s B C' A⟩ = Σ (Bᵀ B C s² A Aᵀ) ⊙ C'

The grid of λ_i has 257 equal steps, and all points between which the cores are linear in λ, or constant: the knots of
"knots"; the points of a strength, both sides of each of its steps, which are neighbouring float32 numbers.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any, Literal

import torch
from torch import Tensor, nn

from nara_diffusion.noise.level import Level, as_level

from .adapter_factors import Adapter, adapter_of_model
from .plain_lora import ExportError, PlainLora, warn_of_scheduler


def to_lora(
    model: nn.Module,
    noise_level: Level | Literal["best"] | None = None,
    adapter_name: str = "default",
) -> PlainLora:
    """The adapter of `model` at one λ as a plain LoRA (a DoRA, if it is a NaRA-DoRA); the model stays as it is.

        to_lora(model, noise_level=0.5).save_pretrained("folder")      # for PeftModel.from_pretrained, without NaRA

    At that λ the update equals the NaRA's up to rounding (a relative 1e-7 in float32); at any other λ it differs. A
    strength, from `set_strength` or the configuration, is included. Every `core_type` and `core_sharing` can be
    exported, and so can a plain LoRA whose strength depends on λ. If the adapter has converted what its base predicts,
    a warning says which scheduler the LoRA needs; it stands in `scheduler` of the result.

    Args:
        model: a PeftModel, a model with an injected adapter (`inject_adapter_in_model`, `unet.add_adapter`,
            `load_nara_weights`), or a model that contains one such; quantised or not.
        noise_level: λ in [0, 1], 1 = pure noise. None takes that of `with noise_level(model, …)`; an adapter that
            doesn't depend on λ needs none. "best" gives the one LoRA whose update is nearest over all λ, for hosts
            without schedules, with its `error`; of a DoRA, the update inside of the norm.
        adapter_name: the name of the adapter.

    Raises:
        ValueError: there is no such adapter; λ is missing, or differs between samples; the adapter can't be a plain
            LoRA (a variant such as aLoRA, another method than LoRA, biases of B); its weights are offloaded or sharded.
    """
    if isinstance(noise_level, str) and noise_level != "best":
        raise ValueError(f'noise_level is {noise_level!r}: pass a number in [0, 1], or "best".')
    if noise_level is not None and not isinstance(noise_level, str):
        as_level(noise_level)  # a λ out of range is an error for adapters that need none, too
    with adapter_of_model(model, adapter_name) as adapter:
        return lora_of(adapter, noise_level)


def lora_of(adapter: Adapter, noise_level: Level | Literal["best"] | None) -> PlainLora:
    """As `to_lora`, of an adapter of a model or of a file."""
    if isinstance(noise_level, str):
        samples = CoreSamples(adapter)
        mean = samples.weights[None]  # T (1, n)
        cores, error = samples.mixed(mean), samples.error(torch.ones_like(mean).T, mean)
    else:
        cores, error = adapter.cores(adapter.level_of(noise_level)), None
    lora = adapter.folded({name: C[0] for name, C in cores.items()})
    warn_of_scheduler(lora.scheduler)
    return replace(lora, error=error)


# ---------------------------------------------------------------------- C over all λ, and errors

_GRID = 257


class CoreSamples:
    """C at λ (n,), in ascending order: a grid, and the breakpoints.

    Attributes:
        levels: (n,) float32. breakpoints: the indices of the breakpoints in it.
        cores: {module: C (n or 1, r, r)}. weights: (n,), by the trapezoidal rule; they sum to 1.
        products: M (n, n), over all layers, float64.
    """

    def __init__(self, adapter: Adapter) -> None:
        points = _breakpoints(adapter)
        self.levels = torch.cat([torch.linspace(0, 1, _GRID, dtype=torch.float32), points]).unique()
        self.breakpoints: list[int] = torch.searchsorted(self.levels, points).tolist()
        self.cores = adapter.cores(self.levels)
        half, zero = self.levels.double().diff() / 2, torch.zeros(1, dtype=torch.float64)
        self.weights = torch.cat([half, zero]) + torch.cat([zero, half])
        self.products = torch.zeros(len(self.levels), len(self.levels), dtype=torch.float64)
        for name, layer in adapter.lora.layers.items():
            A, B = layer.A.double().flatten(1), layer.B.double().flatten(1)
            if B.shape[1] != layer.rank:
                B = torch.block_diag(*B.chunk(layer.groups))
            C = self._doubled(name)
            self.products += (B.T @ B @ C @ (layer.scaling**2 * A @ A.T)).flatten(1) @ C.flatten(1).T

    def _doubled(self, name: str) -> Tensor:
        return self.cores[name].double().expand(len(self.levels), -1, -1)

    def same(self, one: int, other: int) -> bool:
        """Whether all cores are equal at two points of the grid."""
        return all(len(core) == 1 or torch.equal(core[one], core[other]) for core in self.cores.values())

    def mixed(self, mixing: Tensor) -> dict[str, Tensor]:
        """C_k of T (K, n), whose rows sum to 1: {module: (K, r, r)}, float64."""
        return {name: torch.einsum("kn,nrs->krs", mixing, self._doubled(name)) for name in self.cores}

    def error(self, shares: Tensor, mixing: Tensor) -> ExportError:
        """The error over λ of Φ (n, K) and T (K, n)."""
        E = torch.eye(len(self.levels), dtype=torch.float64) - shares @ mixing
        errors = ((E @ self.products) * E).sum(1).clamp(min=0).sqrt()
        unit = (self.weights * self.products.diagonal().clamp(min=0)).sum().sqrt()
        relative = errors / unit if unit else torch.zeros_like(errors)
        return ExportError(self.levels.tolist(), self.weights.tolist(), relative.tolist())


def _breakpoints(adapter: Adapter) -> Tensor:
    """The breakpoints of the adapter in ascending order, 0 and 1 included: (p,) float32."""
    config: Any = adapter.config
    found = [torch.tensor([0.0, 1.0], dtype=torch.float32)]
    for schedule in adapter.schedules:
        levels = torch.tensor([level for level, _ in schedule.points], dtype=torch.float32)
        steps = levels[1:][levels.diff() == 0]
        found += [levels, steps.nextafter(torch.zeros_like(steps))]
    if getattr(config, "core_type", None) == "knots":
        found.append(torch.arange(config.core_knots, dtype=torch.float32) / (config.core_knots - 1))
    return torch.cat(found).unique()
