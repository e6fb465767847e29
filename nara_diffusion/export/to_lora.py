"""Export of a NaRA at one λ as a plain LoRA, exactly: C(λ) is multiplied into B.

    s · B · C(λ) · A  =  α/r · B' · A,        B' = (s r / α) · B · C(λ)

α and r are those of the configuration. s differs from α/r where a strength was set, which then goes into B' too. In a
grouped convolution B is block-diagonal and C is not, so there A' = (s r / α) · C(λ) · A. Products are computed in
float64 and kept in float32 or better.

The one LoRA that is nearest over all λ has the mean of C(λ) in place of C(λ): of all X it minimises
∫ ‖s B (C(λ) − X) A‖² dλ, whatever A and B are. Its error, and that of K fixed cores with strengths φ_k over λ,

    ΔW(λ) ≈ Σ_k φ_k(λ) s B C_k A,        C_k = Σ_i T_ki C(λ_i),

follows from the inner products M_ij = ⟨ΔW(λ_i), ΔW(λ_j)⟩ alone: with Φ_ik = φ_k(λ_i) and E = 1 − Φ T, the squared error
at λ_i is (E M Eᵀ)_ii. M is computed from r × r matrices, so the dense ΔW (d_out, d_in) is never made:

    ⟨s B C A, s B C' A⟩ = Σ (Bᵀ B C s² A Aᵀ) ⊙ C'

The grid of λ_i has 257 equal steps, and all points between which the cores are linear in λ, or constant: the knots of
"knots"; both sides of each step of a mask, neighbouring float32 numbers; the points of a strength.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any, Literal

import torch
from torch import Tensor, nn

from nara_diffusion.loaders.file import configured_scaling
from nara_diffusion.noise.level import Level, NoiseSignals, as_signal, as_signals

from .adapter_factors import Adapter, adapter_of_model
from .plain_lora import ExportError, PlainLora, PlainLoraLayer, warn_of_scheduler


def to_lora(
    model: nn.Module,
    noise_level: Level | Literal["best"] | None = None,
    adapter_name: str = "default",
    *,
    mask_density: Level | None = None,
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
        mask_density: for `core_input` "mask_density" or "both": one value in [0, 1].

    Raises:
        ValueError: there is no such adapter; λ is missing, or differs between samples; the adapter can't be a plain
            LoRA (a variant such as aLoRA, another method than LoRA, biases of B); its weights are offloaded or sharded.
    """
    if isinstance(noise_level, str) and noise_level != "best":
        raise ValueError(f'noise_level is {noise_level!r}: pass a number in [0, 1], or "best".')
    if noise_level is not None and not isinstance(noise_level, str):
        as_signals(noise_level, mask_density)  # a λ out of range is an error for adapters that need none, too
    with adapter_of_model(model, adapter_name) as adapter:
        return lora_of(adapter, noise_level, mask_density)


def lora_of(
    adapter: Adapter, noise_level: Level | Literal["best"] | None, mask_density: Level | None = None
) -> PlainLora:
    """As `to_lora`, of an adapter of a model or of a file."""
    if isinstance(noise_level, str):
        lora = _nearest(adapter, mask_density)
    else:
        signals = adapter.signals_of(noise_level, mask_density)
        lora = assembled(adapter, lambda name: adapter.core(name, signals)[0])
    warn_of_scheduler(lora.scheduler)
    return lora


def _nearest(adapter: Adapter, mask_density: Level | None) -> PlainLora:
    """The LoRA of the mean of C over λ, with its error."""
    samples = CoreSamples(adapter, mask_density)
    mean = samples.weights[None]  # T (1, n)
    error = samples.error(torch.ones_like(mean).T, mean)
    cores = samples.mixed(mean)
    return replace(assembled(adapter, lambda name: cores[name][0]), error=error)


def assembled(adapter: Adapter, core_of: Callable[[str], Tensor]) -> PlainLora:
    """The plain LoRA s · B · C · A with that C (r, r) of each module."""
    if adapter.config.lora_bias:
        raise ValueError(f"Adapter '{adapter.name}' has biases of B (lora_bias=True): save it by save_pretrained.")
    config = adapter.plain_config
    layers = {
        name: _folded(name, layer, core_of(name), configured_scaling(config, name, layer.rank))
        for name, layer in adapter.layers.items()
    }
    return PlainLora(config, layers, adapter.others, scheduler=getattr(adapter.config, "scheduler", None))


def _folded(name: str, layer: PlainLoraLayer, core: Tensor, scaling: float) -> PlainLoraLayer:
    """s · B · C · A of one layer as `scaling` · B' · A'."""
    if scaling == 0 != layer.scaling:
        raise ValueError(
            f"Layer '{name}' has lora_alpha 0 in the configuration, but its scaling is {layer.scaling:g}: set "
            "lora_alpha in the configuration to what it was in training."
        )
    gain = 1.0 if scaling == layer.scaling else layer.scaling / scaling
    plain = replace(layer, alpha=scaling * layer.rank)
    if gain == 1.0 and torch.equal(core, torch.eye(layer.rank, dtype=core.dtype)):
        return plain
    core = gain * core.double()
    if layer.groups > 1 and not layer.is_embedding:
        return replace(plain, A=_kept(core @ layer.A.double().flatten(1), layer.A))
    return replace(plain, B=_kept(layer.B.double().flatten(1) @ core, layer.B))


def _kept(product: Tensor, like: Tensor) -> Tensor:
    return product.view(like.shape).to(torch.promote_types(like.dtype, torch.float32))


# ---------------------------------------------------------------------- C on a grid of λ, and errors

GRID = 257
_SCAN = 4097


class CoreSamples:
    """C at λ (n,), in ascending order: GRID equal steps, and the breakpoints.

    Attributes:
        levels: (n,) float32. breakpoints: the indices of the breakpoints in it.
        cores: {module: C (n or 1, r, r), float64}. weights: (n,), by the trapezoidal rule; they sum to 1.
        products: M (n, n), over all layers, float64.
    """

    def __init__(self, adapter: Adapter, mask_density: Level | None) -> None:
        adapter.signals_of(0.5, mask_density)  # raises if the mask density is missing
        points = _breakpoints(adapter)
        self.levels = torch.cat([torch.linspace(0, 1, GRID, dtype=torch.float32), points]).unique()
        self.breakpoints: list[int] = torch.searchsorted(self.levels, points).tolist()
        density = None if mask_density is None else as_signal(mask_density, "mask_density").expand_as(self.levels)
        self.cores = _cores_at(adapter, NoiseSignals(self.levels, density))
        half = self.levels.double().diff() / 2
        zero = half.new_zeros(1)
        self.weights = torch.cat([half, zero]) + torch.cat([zero, half])
        self.products = torch.zeros(len(self.levels), len(self.levels), dtype=torch.float64)
        for name, layer in adapter.layers.items():
            A, B = layer.A.double().flatten(1), layer.B.double().flatten(1)
            if B.shape[1] != layer.rank:
                B = torch.block_diag(*B.chunk(layer.groups))
            C = self.cores[name].expand(len(self.levels), -1, -1)
            self.products += (B.T @ B @ C @ (layer.scaling**2 * A @ A.T)).flatten(1) @ C.flatten(1).T

    def same(self, one: int, other: int) -> bool:
        """Whether all cores are equal at two points of the grid."""
        return all(len(core) == 1 or torch.equal(core[one], core[other]) for core in self.cores.values())

    def mixed(self, mixing: Tensor) -> dict[str, Tensor]:
        """C_k of T (K, n), whose rows sum to 1: {module: (K, r, r)}."""
        n = len(self.levels)
        return {name: torch.einsum("kn,nrs->krs", mixing, C.expand(n, -1, -1)) for name, C in self.cores.items()}

    def error(self, shares: Tensor, mixing: Tensor) -> ExportError:
        """The error over λ of Φ (n, K) and T (K, n)."""
        E = torch.eye(len(self.levels), dtype=torch.float64) - shares @ mixing
        errors = ((E @ self.products) * E).sum(1).clamp(min=0).sqrt()
        unit = (self.weights * self.products.diagonal().clamp(min=0)).sum().sqrt()
        relative = errors / unit if unit else torch.zeros_like(errors)
        return ExportError(self.levels.tolist(), self.weights.tolist(), relative.tolist())


def _cores_at(adapter: Adapter, signals: NoiseSignals) -> dict[str, Tensor]:
    by_key: dict[Any, Tensor] = {}
    found = {}
    for name, layer in adapter.layers.items():
        key = (adapter.keys[name], layer.rank)
        if key not in by_key:  # layers that share a core share its samples
            by_key[key] = adapter.core(name, signals).double()
        found[name] = by_key[key]
    return found


def _breakpoints(adapter: Adapter) -> Tensor:
    """The breakpoints of the adapter in ascending order, 0 and 1 included: (p,) float32."""
    config: Any = adapter.config
    found = [torch.tensor([0.0, 1.0], dtype=torch.float32)]
    for schedule in adapter.schedules:
        levels = torch.tensor([level for level, _ in schedule.points], dtype=torch.float32)
        steps = levels[1:][levels.diff() == 0]
        found += [levels, steps.nextafter(torch.zeros_like(steps))]
    kind = getattr(config, "core_type", None)
    if kind == "knots":
        found.append(torch.arange(config.core_knots, dtype=torch.float32) / (config.core_knots - 1))
    if kind in ("rank_mask", "bins"):
        found.append(_steps_of_masks(adapter))
    return torch.cat(found).unique()


def _steps_of_masks(adapter: Adapter) -> Tensor:
    """Both sides of each λ at which a mask changes, by bisection."""

    def differ(one: Tensor, other: Tensor) -> Tensor:
        pairs = (_cores_at(adapter, NoiseSignals(levels)).values() for levels in (one, other))
        zeros = ((mine == 0) != (theirs == 0) for mine, theirs in zip(*pairs, strict=True))
        return torch.stack([changed.flatten(1).any(1) for changed in zeros]).any(0)

    scan = torch.linspace(0, 1, _SCAN, dtype=torch.float32)
    changes = differ(scan[:-1], scan[1:])
    low, high = scan[:-1][changes], scan[1:][changes]
    while bool(((middle := (low + high) / 2) != low).logical_and(middle != high).any()):
        above = differ(low, middle)
        low, high = torch.where(above, low, middle), torch.where(above, middle, high)
    return torch.cat([low, high])
