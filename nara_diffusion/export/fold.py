"""Export of a NaRA at one λ as a plain LoRA, exactly: C(λ) is multiplied into B.

    s · B · C(λ) · A  =  α/r · B' · A,        B' = (s r / α) · B · C(λ)

α and r are those of the configuration. s differs from α/r where a strength was set, which then goes into B' too. In a
grouped convolution B is block-diagonal and C is not, so there A' = (s r / α) · C(λ) · A. Products are computed in
float64 and kept in float32 or better.

The one LoRA that is nearest over all λ has the mean of C(λ) in place of C(λ): of all X it minimises
∫ ‖s B (C(λ) − X) A‖² dλ, whatever A and B are.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Literal

import torch
from peft import get_peft_model_state_dict
from torch import Tensor, nn

from nara_diffusion.loaders.strict import is_core_key
from nara_diffusion.noise.signals import Level, as_signals

from .adapted_layers import AdaptedLayer, Adapter, read_adapter
from .core_samples import CoreSamples, core_in
from .lora.config import configured_scaling, plain_config
from .lora.plain_lora import PlainLora, PlainLoraLayer
from .lora.scheduler import warn_of_scheduler


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
            LoRA (a LoRA variant such as aLoRA, or another method than LoRA); its weights are offloaded or sharded.
    """
    if isinstance(noise_level, str) and noise_level != "best":
        raise ValueError(f'noise_level is {noise_level!r}: pass a number in [0, 1], or "best".')
    if noise_level is not None and not isinstance(noise_level, str):
        as_signals(noise_level, mask_density)  # a λ out of range is an error for adapters that need none, too
    with read_adapter(model, adapter_name) as adapter:
        if isinstance(noise_level, str):
            lora = _nearest(adapter, mask_density)
        else:
            signals = adapter.signals(noise_level, mask_density)
            lora = assembled(adapter, lambda layer: adapter.core(layer, signals)[0])
    warn_of_scheduler(lora.scheduler)
    return lora


def _nearest(adapter: Adapter, mask_density: Level | None) -> PlainLora:
    """The LoRA of the mean of C over λ, with its error."""
    adapter.signals(0.5, mask_density)  # raises if the mask density is missing
    samples = CoreSamples(adapter, mask_density)
    mean = samples.weights[None]  # T (1, n)
    cores = samples.mixed(mean)
    error = samples.error(torch.ones_like(mean).T, mean)
    return replace(assembled(adapter, lambda layer: core_in(cores, layer, 0)), error=error)


def assembled(adapter: Adapter, core_of: Callable[[AdaptedLayer], Tensor]) -> PlainLora:
    """The plain LoRA s · B · C · A with that C (r, r) in each layer."""
    config = plain_config(adapter.root, adapter.config, {layer.name: layer.rank for layer in adapter.layers})
    layers = {}
    for layer in adapter.layers:
        scaling = configured_scaling(config, layer.name, layer.rank)
        layers[layer.name] = folded(layer, core_of(layer), scaling)
    return PlainLora(config, layers, _others(adapter), scheduler=getattr(adapter.config, "scheduler", None))


def folded(layer: AdaptedLayer, core: Tensor, scaling: float) -> PlainLoraLayer:
    """s · B · C · A of one layer as `scaling` · B' · A'."""
    gain = _gain(layer, scaling)
    plain = PlainLoraLayer(
        layer.A, layer.B, scaling * layer.rank, layer.rank, layer.bias, layer.magnitude, layer.is_embedding
    )
    if layer.bias is not None and gain != 1.0:
        plain = replace(plain, bias=(layer.bias.double() * gain).to(_kept(layer.bias)))
    if gain == 1.0 and torch.equal(core, torch.eye(layer.rank, dtype=core.dtype)):
        return plain
    core = gain * core.double()
    if layer.groups > 1:
        A = core @ layer.A.double().flatten(1)
        return replace(plain, A=A.view(layer.A.shape).to(_kept(layer.A)))
    B = layer.B.double().flatten(1) @ core
    return replace(plain, B=B.view(layer.B.shape).to(_kept(layer.B)))


def _gain(layer: AdaptedLayer, scaling: float) -> float:
    """s divided by the scale of the configuration. Raises ValueError if that scale is 0 and s is not."""
    if scaling == layer.scaling:
        return 1.0
    if scaling == 0:
        raise ValueError(
            f"Layer '{layer.name}' has lora_alpha 0 in the configuration, but its scaling is {layer.scaling:g}: set "
            "lora_alpha in the configuration to what it was in training."
        )
    return layer.scaling / scaling


def _kept(tensor: Tensor) -> torch.dtype:
    return torch.promote_types(tensor.dtype, torch.float32)


def _others(adapter: Adapter) -> dict[str, Tensor]:
    """The tensors of the adapter that are not A, B, biases of B, magnitudes or cores, by PEFT's names."""
    with torch.no_grad():
        held = get_peft_model_state_dict(
            adapter.root, adapter.root.state_dict(), adapter.name, save_embedding_layers=False
        )
    own = tuple(f"{layer.name}.lora_" for layer in adapter.layers)
    rest = {key: tensor for key, tensor in held.items() if not key.startswith(own) and not is_core_key(key)}
    return {key: tensor.detach().to("cpu", copy=True) for key, tensor in rest.items()}
