"""MultiAlign of DiffSynth-Studio, a LoRA with a gain and an offset over time, in PEFT's folder.

    y = W x + s B (γ(t) ⊙ A x + β(t)),      γ = W_γ e(t) + b_γ,      β = W_β e(t) + b_β

e(t) is the sinusoidal embedding of size 256 that FLUX's time embedding reads, at t = 1000 σ. γ is a diagonal core of
each layer. β doesn't depend on x, so B C(λ) A can't express it: values other than 0 raise an error.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from nara_diffusion.loaders.format import AdapterPart
from nara_diffusion.tuner.config import NaraConfig
from nara_diffusion.tuner.holder.core_holder import HOLDER_NAME
from nara_diffusion.tuner.holder.core_set import core_group
from nara_diffusion.tuner.state_dict import PEFT_PREFIX

_TENSORS = {f"{kind}.weight" for kind in ("lora_A", "lora_B", "lora_time_gamma", "lora_time_beta")} | {
    "lora_time_gamma.bias",
    "lora_time_beta.bias",
}


def is_multialign(tensors: Mapping[str, Any]) -> bool:
    """Whether these are the tensors of a MultiAlign file."""
    return any(".lora_time_gamma." in key for key in tensors)


def read_multialign(tensors: Mapping[str, Tensor], config: Mapping[str, Any], origin: str) -> AdapterPart:
    """The part of the denoiser. `config`: of adapter_config.json. Raises ValueError: see `read_foreign`."""
    layers: dict[str, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        name, _, kind = key.removeprefix(PEFT_PREFIX).partition(".lora_")
        layers.setdefault(name, {})[f"lora_{kind}"] = tensor
    for name, own in layers.items():
        _check_layer(own, name, origin)
    nara = _config(config, layers, origin)
    found = {}
    for name, own in layers.items():
        if len(own["lora_A.weight"]) != nara.r:
            raise ValueError(f"{origin} has rank {len(own['lora_A.weight'])} in '{name}', its configuration {nara.r}.")
        core = f"{HOLDER_NAME}.{core_group(nara, name, nara.r)}"
        found |= {
            f"{name}.lora_A.weight": own["lora_A.weight"],
            f"{name}.lora_B.weight": own["lora_B.weight"],
            f"{core}.weight": own["lora_time_gamma.weight"].float(),
            f"{core}.bias": own["lora_time_gamma.bias"].float(),
        }
    return AdapterPart(nara, found)


def _check_layer(own: Mapping[str, Tensor], name: str, origin: str) -> None:
    if own.keys() != _TENSORS:
        raise ValueError(
            f"{origin} has {', '.join(sorted(own))} of '{name}', where {sorted(_TENSORS)} belong: damaged."
        )
    for kind in ("lora_time_beta.weight", "lora_time_beta.bias"):
        if bool(own[kind].any()):
            raise ValueError(
                f"{origin} has a {kind} that isn't 0 in '{name}', up to {float(own[kind].abs().max()):.3g}: β(t), an "
                "offset that depends on time and not on the input, can't be expressed by B C(λ) A, and without it the "
                "adapter would be another one."
            )


def _config(config: Mapping[str, Any], layers: Mapping[str, Mapping[str, Tensor]], origin: str) -> NaraConfig:
    for field in ("r", "lora_alpha"):
        if not isinstance(config.get(field), (int, float)):
            raise ValueError(f"The configuration beside {origin} has {field} {config.get(field)!r}: damaged.")
    if config.get("use_dora") or config.get("rank_pattern") or config.get("alpha_pattern"):
        raise ValueError(f"The configuration beside {origin} has DoRA or several ranks, which MultiAlign doesn't have.")
    widths = {own["lora_time_gamma.weight"].shape[1] for own in layers.values()}
    if len(widths) > 1:
        raise ValueError(f"{origin} has embeddings of time of widths {sorted(widths)}: damaged.")
    return NaraConfig(
        r=config["r"],
        lora_alpha=config["lora_alpha"],
        use_rslora=bool(config.get("use_rslora", False)),
        target_modules=sorted(layers),
        core_type="diagonal",
        core_sharing="layer",
        noise_embedding_dim=widths.pop(),
        noise_convention="flow",
    )
