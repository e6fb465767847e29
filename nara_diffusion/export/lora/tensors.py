"""Conversion of a LoRA's tensors, by PEFT's keys, to a `PlainLora`; a tensor that is none of it is an error."""

from __future__ import annotations

import re
from collections.abc import Mapping

from peft import LoraConfig
from torch import Tensor

from nara_diffusion.loaders.file import by_pattern

from .config import configured_scaling
from .plain_lora import PlainLora, PlainLoraLayer

_TENSOR = re.compile(
    r"(?P<name>.+)\.(?P<kind>lora_A\.weight|lora_B\.weight|lora_B\.bias|lora_embedding_A|lora_embedding_B|"
    r"lora_magnitude_vector)(?:\.weight)?"
)
"""The key of a tensor. Diffusers and Transformers write .weight after lora_magnitude_vector, PEFT does not."""


_IN_CLIP = re.compile(r"encoder\.layers\.\d+\.(self_attn|mlp)\.")
"""The name of an adapted module in CLIPTextModel, with which transformers 4 and other programs write `text_model`."""


def with_text_model(name: str) -> str:
    """The name in a text encoder with `text_model`, which transformers 5 leaves out of the names in CLIPTextModel."""
    return f"text_model.{name}" if _IN_CLIP.match(name) else name


def lora_of_tensors(config: LoraConfig, tensors: Mapping[str, Tensor], origin: str) -> PlainLora:
    """The LoRA that PEFT makes of `config` and `tensors`. `origin` names the file in messages.

    Raises:
        ValueError: there is A without B or B without A, an unknown key, or a rank or DoRA that the configuration
            contradicts.
    """
    found, others = by_layer(tensors, origin)
    layers = {}
    for name, own in found.items():
        rank = _rank(name, own, origin)
        configured = by_pattern(config.rank_pattern, name, config.r)  # type: ignore[arg-type]
        if rank != configured:
            raise ValueError(
                f"{origin} has rank {rank} in '{name}', but its configuration says {configured}: pass the "
                "configuration that was saved with these tensors."
            )
        layers[name] = plain_layer(own, configured_scaling(config, name, rank) * rank)
    _check_kind(config, layers, origin)
    return PlainLora(config, layers, others)


def by_layer(tensors: Mapping[str, Tensor], origin: str) -> tuple[dict[str, dict[str, Tensor]], dict[str, Tensor]]:
    """{layer: {kind of tensor: tensor}} of the layers, and the other tensors.

    Raises:
        ValueError: no layer, A without B, B without A, or a key of a LoRA that PEFT doesn't write.
    """
    found: dict[str, dict[str, Tensor]] = {}
    others: dict[str, Tensor] = {}
    for key, tensor in tensors.items():
        match = _TENSOR.fullmatch(key)
        if match:
            found.setdefault(match["name"], {})[match["kind"]] = tensor
        elif "lora" in key.lower():
            raise ValueError(
                f"{origin} holds '{key}', which is no key of a LoRA in PEFT's format: pass what save_pretrained or "
                "get_peft_model_state_dict gave."
            )
        else:
            others[key] = tensor
    for name, own in found.items():
        _check_whole(name, own, origin)
    if not found:
        raise ValueError(
            f"{origin} holds no LoRA: its tensors are {', '.join(map(repr, list(tensors)[:3])) or 'none'}."
        )
    return found, others


def plain_layer(own: Mapping[str, Tensor], alpha: float) -> PlainLoraLayer:
    """One layer of `by_layer`."""
    is_embedding = "lora_embedding_A" in own
    A, B = (own["lora_embedding_A"], own["lora_embedding_B"]) if is_embedding else (
        own["lora_A.weight"], own["lora_B.weight"])  # fmt: skip
    return PlainLoraLayer(A, B, alpha, len(A), own.get("lora_B.bias"), own.get("lora_magnitude_vector"), is_embedding)


def _check_whole(name: str, own: Mapping[str, Tensor], origin: str) -> None:
    pairs = [{"lora_A.weight", "lora_B.weight"}, {"lora_embedding_A", "lora_embedding_B"}]
    if not any(pair <= own.keys() for pair in pairs):
        raise ValueError(
            f"{origin} has only {', '.join(sorted(own))} of '{name}': A and B are both needed, so it is damaged."
        )


def _rank(name: str, own: Mapping[str, Tensor], origin: str) -> int:
    layer = plain_layer(own, 1.0)
    fits = layer.A.dim() >= 2 and layer.B.dim() >= 2 and layer.A.numel() > 0 and layer.B.numel() > 0
    if not fits or layer.rank % layer.B.shape[1]:  # the groups of a convolution divide r
        raise ValueError(
            f"{origin} has A {tuple(layer.A.shape)} and B {tuple(layer.B.shape)} in '{name}', expected A (r, d_in, …) "
            "and B (d_out, r, …): it is damaged."
        )
    return layer.rank


def _check_kind(config: LoraConfig, layers: Mapping[str, PlainLoraLayer], origin: str) -> None:
    for name, layer in layers.items():
        if (layer.magnitude is not None) != bool(config.use_dora):
            what = "a magnitude (DoRA)" if layer.magnitude is not None else "no magnitude (DoRA)"
            raise ValueError(
                f"{origin} has {what} in '{name}', but use_dora={config.use_dora}: pass the configuration that was "
                "saved with these tensors."
            )
