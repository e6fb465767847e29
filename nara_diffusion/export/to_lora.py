"""Export of a NaRA at one λ as a plain LoRA, exactly: C(λ) is multiplied into B.

    s · B · C(λ) · A  =  α/r · B' · A,        B' = (s r / α) · B · C(λ)

α and r are those of the configuration. s differs from α/r where a strength was set, which then goes into B' too. In a
grouped convolution B is block-diagonal and C is not, so there A' = (s r / α) · C(λ) · A. Products are computed in
float64 and kept in float32 or better. `core_samples` has the one LoRA that is nearest over all λ, and its error.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Literal

import torch
from torch import Tensor, nn

from nara_diffusion.loaders.file import configured_scaling
from nara_diffusion.noise.level import Level, as_signals

from .adapter_factors import Adapter, adapter_of_model
from .core_samples import CoreSamples
from .plain_lora import PlainLora, PlainLoraLayer, warn_of_scheduler


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
        samples = CoreSamples(adapter, mask_density)
        mean = samples.weights[None]  # T (1, n)
        cores, error = samples.mixed(mean), samples.error(torch.ones_like(mean).T, mean)
    else:
        cores, error = adapter.cores(adapter.signals_of(noise_level, mask_density)), None
    lora = assembled(adapter, {name: C[0] for name, C in cores.items()})
    warn_of_scheduler(lora.scheduler)
    return replace(lora, error=error)


def assembled(adapter: Adapter, cores: Mapping[str, Tensor]) -> PlainLora:
    """The plain LoRA s · B · C · A with that C (r, r) of each module."""
    if adapter.config.lora_bias:
        raise ValueError("The adapter has biases of B (lora_bias=True): save it by save_pretrained.")
    lora = adapter.lora
    layers = {
        name: _folded(name, layer, cores[name], configured_scaling(lora.config, name, layer.rank))
        for name, layer in lora.layers.items()
    }
    return replace(lora, layers=layers)


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
