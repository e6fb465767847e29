"""Compute the start factors of a T-LoRA that its file leaves out, from the base's weights.

    W = P₀ diag(λ₀) Q₀ + …      W (d_out, d_in), P₀ (d_out, r), λ₀ (r,), Q₀ (r, d_in)

LyCORIS starts P, λ and Q from the r largest singular triples of each weight and subtracts their
product from the update, but saves only the trained factors. An SVD in float32 takes .7 s for a
weight of 1280², and 12 s for one of 3072² (one CPU thread), so the factors are kept in a file
beside the adapter. Its name has a digest of the base's weights and the rank.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from tqdm.auto import tqdm

from nara_diffusion.config import changes_base
from nara_diffusion.layers.residual import Triples, singular_triples
from nara_diffusion.utils.files import atomic_write, digest_tensors
from nara_diffusion.utils.wording import listed

from .insertion import adapters_of
from .tensor_files import read_tensors, save_tensors

logger = logging.getLogger(__name__)

SUFFIX = ".base_factors"
"""The suffix of the files with start factors, which aren't adapters."""
_LAYERS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)


def base_layer(model: nn.Module, name: str) -> Any:
    """Return a linear or convolution layer of `model`, without its adapters.

    Raises:
        ValueError: it is a layer of another kind, or its weight isn't the original one: it is
            quantised, offloaded, has an adapter fused into it, or an adapter's initialisation has
            changed it.
    """
    module: Any = model.get_submodule(name)
    layer = module.get_base_layer() if isinstance(module, BaseTunerLayer) else module
    if not isinstance(layer, _LAYERS):
        raise ValueError(f"'{name}' is a {type(layer).__name__}, which T-LoRA doesn't adapt.")
    if fused := getattr(module, "merged_adapters", None):
        raise ValueError(
            f"'{name}' has {listed(fused)} fused into its weight, but the adapter's start factors come "
            "from the original weight. Call pipe.unfuse_lora() first, and fuse again afterwards."
        )
    for adapter, config in adapters_of(model).items():
        if changes_base(getattr(config, "init_lora_weights", None)):
            raise ValueError(
                f"Adapter '{adapter}' changed the base's weights (init_lora_weights={config.init_lora_weights!r}), "
                "but the new adapter's start factors come from the original ones. Load it into a fresh pipeline."
            )
    weight = layer.weight.data
    if weight.is_meta:
        raise ValueError(
            f"The weight of '{name}' is offloaded. Load the adapter before offloading the base."
        )
    if type(weight) is not Tensor or not weight.is_floating_point() or weight.itemsize < 2:
        raise ValueError(
            f"The weight of '{name}' is quantised ({type(layer.weight).__name__}, {weight.dtype}), but the "
            "adapter's start factors come from the original weight. Load the adapter into the base in "
            "bfloat16 or float32, call pipe.save_nara_weights, and load that file into the quantised base."
        )
    return layer


def base_factors(weights: Mapping[str, Tensor], rank: int, file: Path | None) -> dict[str, Triples]:
    """Return {module: (P₀ (d_out, r), λ₀ (r,), Q₀ (r, d_in))}, float32.

    They are read from the file beside the adapter if it belongs to these weights and is undamaged.
    Otherwise, they are computed, on the GPU if there is one, and written to that file if the folder
    allows it. For a convolution, the columns of Q₀ are those of the kernel's first element, as in
    LyCORIS.

    Args:
        weights: {module: W (d_out, d_in, …)}.
        rank: r.
        file: the adapter's file, or None for a dict of tensors.
    """
    digest = digest_tensors({**weights, "rank": torch.tensor(rank)})
    cache = None if file is None else file.with_suffix(f".{digest[:16]}{SUFFIX}")
    tensors: dict[str, Tensor] = {}
    metadata = None
    if cache is not None:
        with suppress(OSError, ValueError):  # it is missing or damaged
            tensors, metadata = read_tensors(cache)
    if (metadata or {}).get("digest") != digest_tensors(tensors):
        tensors = {}
        device = "cuda" if torch.cuda.is_available() else "cpu"
        for name, weight in tqdm(weights.items(), desc="SVD of the base", leave=False):
            P, values, Q = singular_triples(weight.to(device).float().flatten(1), rank)
            for label, tensor in {"p": P, "s": values, "q": Q[:, : weight.shape[1]]}.items():
                tensors[f"{name}.{label}"] = tensor.cpu().contiguous()
        if cache is not None:
            try:
                with atomic_write(cache) as partial:
                    save_tensors(tensors, partial, {"digest": digest_tensors(tensors)})
            except OSError as error:
                logger.info("The start factors aren't kept: %s", error)
    return {name: Triples(*(tensors[f"{name}.{label}"] for label in "psq")) for name in weights}
