"""T-LoRA as LyCORIS writes it (algo "tlora"), with modules' names joined by "_".

    ΔW(t) = α / r (P diag(λ ⊙ m(t)) Q − P⁰ diag(λ⁰ ⊙ m(t)) Q⁰)      q_layer.weight, p_layer.weight, lambda_layer, alpha

Its files don't have the start: P⁰, λ⁰, Q⁰ are the r largest singular values of the base weight W with their vectors,
which LyCORIS computes again when it loads. m(t) is as in `tlora`; the training program, such as SimpleTuner, sets it.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from nara_diffusion.loaders.format import AdapterPart
from nara_diffusion.loaders.validation import base_modules
from nara_diffusion.runtime.offloading import onloaded

from .masked import Factors, masked_part
from .pairs import Singular, pair_factors, singular

_LAYER = re.compile(r"(?P<prefix>lycoris|lora_unet|lora_transformer)_(?P<name>[^.]+)\.(?P<kind>.+)")
_KINDS = {"q_layer.weight", "p_layer.weight", "lambda_layer", "alpha"}
_TEXT = re.compile(r"lora_te\d*_")


def is_lycoris(tensors: Mapping[str, Any]) -> bool:
    """Whether these are the tensors of a LyCORIS T-LoRA."""
    return any(key.endswith(".lambda_layer") and ".processor." not in key for key in tensors)


def read_lycoris(tensors: Mapping[str, Tensor], model: nn.Module, rank_mask_min: int, origin: str) -> AdapterPart:
    """The part of the denoiser. Raises ValueError: see `read_foreign`."""
    modules = dict(base_modules(model))
    names = _by_joined_name(modules)
    layers: dict[str, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        match = _LAYER.fullmatch(key)
        if match is None or match["kind"] not in _KINDS:
            raise ValueError(f"{origin} holds '{key}': {_why(key)}")
        if match["name"] not in names:
            raise ValueError(
                f"{origin} adapts '{match['name']}', which is no module of {type(model).__name__} with its name joined "
                "by '_': it was trained on another base model, or by a program that gives modules other names."
            )
        layers.setdefault(names[match["name"]], {})[match["kind"]] = tensor
    factors, scales = {}, {}
    for name, own in layers.items():
        if own.keys() != _KINDS:
            raise ValueError(
                f"{origin} has {', '.join(sorted(own))} of '{name}', but not all of {sorted(_KINDS)}: damaged."
            )
        scales[name] = float(own["alpha"]) / len(own["q_layer.weight"])
        factors[name] = _factors(own, modules[name], f"'{name}' in {origin}")
    if len(set(scales.values())) > 1:
        raise ValueError(f"{origin} has layers of scales {sorted(set(scales.values()))}: one for all can be expressed.")
    return masked_part(factors, next(iter(scales.values())), rank_mask_min, origin, in_pairs=True)


def _by_joined_name(modules: Mapping[str, nn.Module]) -> dict[str, str]:
    """{name with "_" for ".": name}, without names that would be the same."""
    found: dict[str, list[str]] = {}
    for name in modules:
        found.setdefault(name.replace(".", "_"), []).append(name)
    return {joined: names[0] for joined, names in found.items() if len(names) == 1}


def _why(key: str) -> str:
    if _TEXT.match(key):
        return "text encoders run before there is a λ, so that a T-LoRA of them can't be expressed."
    if key.endswith((".dora_scale", ".bias")) or "scalar" in key:
        return "this field of LyCORIS can't be expressed."
    return "it is no tensor of a T-LoRA that is known here."


def _factors(own: Mapping[str, Tensor], layer: Any, where: str) -> Factors:
    layer = layer.get_base_layer() if hasattr(layer, "get_base_layer") else layer
    kernel = getattr(layer, "kernel_size", ())
    if any(size != 1 for size in kernel):
        raise ValueError(
            f"{where} is a convolution of {'×'.join(map(str, kernel))}, whose q_layer is of one pixel with the layer's "
            "own stride and padding: of T-LoRA's convolutions 1×1 can be expressed."
        )
    now = singular(own["p_layer.weight"], own["lambda_layer"], own["q_layer.weight"], where)
    with onloaded(layer):
        W = layer.weight.detach().double().cpu().flatten(1)
    if W.shape != (len(now.P), now.Q.shape[1]):
        raise ValueError(
            f"{where} is for a weight {(len(now.P), now.Q.shape[1])}, this layer has {tuple(W.shape)}: it was trained "
            "on another base model."
        )
    A, B = pair_factors(now, _largest(W, len(now.lam)))
    ones = [1] * len(kernel)
    return A.view(*A.shape, *ones), B.view(*B.shape, *ones)


def _largest(W: Tensor, rank: int) -> Singular:
    """The `rank` largest singular values of W with their vectors, padded with zeros."""
    U, S, Vh = torch.linalg.svd(W, full_matrices=False)
    missing = max(0, rank - len(S))
    return Singular(pad(U[:, :rank], (0, missing)), pad(S[:rank], (0, missing)), pad(Vh[:rank], (0, 0, 0, missing)))
