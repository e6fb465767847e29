"""Adapt DiffusionGemma, a model with an encoder and a decoder that share their weights.

    encoder   clean tokens, λ = 0:      y = W0 x + s B C(0) A x
    decoder   a canvas with noise λ:    y = W0 x + s B C(λ) A x

An adapter on one projection has one A, one B, one magnitude and one core for both. An encoder layer
uses the modules of its *twin*, the decoder layer with the same weight. These modules are saved
once, under the decoder's name. A decoder may be adapted without its encoder, but not the reverse.
For any other model, no name has a twin, and the functions of this file change nothing.

`adapted_forwards` says which forwards get C. Exporting from a file raises an error, because the file
has no keys for the encoder.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import NamedTuple

import torch
from peft.tuners.lora import LoraLayer
from peft.tuners.tuners_utils import check_target_module_exists
from torch import Tensor, nn

from nara_diffusion.config import NaraConfig
from nara_diffusion.noise.sources import CORRUPTED_SHARE

_WITH_TWINS = "DiffusionGemmaModel"
_ENCODER, _DECODER = "encoder.language_model.", "decoder."


class Twins(NamedTuple):
    """The encoder (at λ = 0) and the decoder (at λ) of a DiffusionGemma, and their parent module."""

    owner: nn.Module
    encoder: nn.Module
    decoder: nn.Module


def twins_of(root: nn.Module) -> Twins | None:
    """Return the twins of a DiffusionGemma, with or without PEFT's wrapper; None otherwise."""
    owner: nn.Module | None = root
    while isinstance(owner, nn.Module):
        if _WITH_TWINS in [kind.__name__ for kind in type(owner).__mro__]:
            return Twins(owner, owner.get_submodule("encoder"), owner.get_submodule("decoder"))
        owner = getattr(owner, "model", None)
    return None


def decoder_name(root: nn.Module, name: str) -> str | None:
    """Return the name of an encoder layer's twin, or None for a layer without a twin."""
    prefix, is_inside, suffix = name.partition(_ENCODER)
    return f"{prefix}{_DECODER}{suffix}" if is_inside and twins_of(root) else None


def share_factors(root: nn.Module, adapter_name: str, layers: Mapping[str, LoraLayer]) -> list[str]:
    """Give encoder layers the factors of their twins, and return the names of these layers.

    Repeating is safe.

    Raises:
        ValueError: an encoder layer is adapted without its twin, or has another rank.
    """
    twins = {name: decoder_name(root, name) for name in layers}
    shared = {name: twin for name, twin in twins.items() if twin is not None}
    for name, twin in shared.items():
        if twin not in layers:
            raise ValueError(
                f"target_modules match '{name}' but not '{twin}', which has the same weight: adapt "
                "both, or only the decoder."
            )
        layer = layers[name]
        rank, other_rank = layer.r[adapter_name], layers[twin].r[adapter_name]
        if rank != other_rank:
            raise ValueError(
                f"rank_pattern gives '{name}' rank {rank} but '{twin}', which has the same weight, "
                f"rank {other_rank}: give both the same."
            )
        for attribute in layer.adapter_layer_names:
            of_twin = getattr(layers[twin], attribute, {})
            if adapter_name in of_twin:
                getattr(layer, attribute)[adapter_name] = of_twin[adapter_name]
    return list(shared)


def without_twins(root: nn.Module, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return an adapter's tensors without those that encoder layers share with their twins."""
    return {key: tensor for key, tensor in tensors.items() if _twin_key(root, key) not in tensors}


def with_twins(
    root: nn.Module, tensors: dict[str, Tensor], names: Iterable[str]
) -> dict[str, Tensor]:
    """Return an adapter's tensors with the shared ones repeated under the encoder layers' `names`.

    Raises:
        ValueError: `tensors` contain other factors for an encoder layer.
    """
    of_decoder = with_equal_twins(root, tensors, "the file")
    twins = {name: _twin_key(root, name) for name in names}
    return of_decoder | {name: tensors[twin] for name, twin in twins.items() if twin in tensors}


def with_encoder_layers(
    root: nn.Module, config: NaraConfig, ranks: Mapping[str, int]
) -> dict[str, int]:
    """Return {adapted layer: its rank} of a file, with the encoder layers that it does not name."""
    completed = dict(ranks)
    for name, _ in root.named_modules():
        twin = decoder_name(root, name)
        if twin is not None and twin in ranks and check_target_module_exists(config, name):
            completed[name] = ranks[twin]
    return completed


def with_equal_twins(
    root: nn.Module, tensors: Mapping[str, Tensor], origin: str
) -> dict[str, Tensor]:
    """Return the tensors of a LoRA without the encoder's, which must equal the decoder's.

    Raises:
        ValueError: an encoder layer has other factors than its twin.
    """
    of_decoder = without_twins(root, tensors)
    for key in sorted(tensors.keys() - of_decoder.keys()):
        twin = decoder_name(root, key)
        if twin is not None and not torch.equal(tensors[key], tensors[twin]):
            raise ValueError(
                f"'{key}' of the encoder differs from the decoder's in {origin}, but a NaRA has one A and one "
                "B for both. Pass a NaRA, or a LoRA of the decoder (--no_train_on_encoder)."
            )
    return of_decoder


def _twin_key(root: nn.Module, key: str) -> str | None:
    """Return the decoder's key for a factor of an encoder layer, or None for any other key."""
    return decoder_name(root, key) if ".lora_" in key else None


def check_foldable_file(config: NaraConfig) -> None:
    """Raise ValueError for a DiffusionGemma adapter, since its file has no keys for the encoder."""
    base = (getattr(config, "auto_mapping", None) or {}).get("base_model_class") or ""
    if config.noise_convention == CORRUPTED_SHARE or "DiffusionGemma" in base:
        raise ValueError(
            "The file contains an adapter of DiffusionGemma, which its encoder (λ = 0) and its decoder "
            "share. A LoRA at one λ is right for neither: load the file as it is."
        )
