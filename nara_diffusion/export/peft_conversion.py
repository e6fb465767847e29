"""PEFT's `convert_to_lora` and `save_as_lora` for an adapter with cores, at the λ of `noise_level(…)`.

PEFT computes ΔW of linear layers and factors it by an SVD. Here the factors are known: the LoRA is that of `to_lora`,
exact and for all kinds of layers. A smaller rank is reached by an SVD of the factors.
"""

from __future__ import annotations

from dataclasses import replace
from types import FunctionType
from typing import Any

import torch
from peft import LoraConfig, PeftModel
from peft.tuners.lora.conversion import convert_to_lora
from torch import Tensor, nn

from nara_diffusion.config import NaraConfig
from nara_diffusion.loaders.strict import PEFT_PREFIX
from nara_diffusion.tuner.holder.core_holder import HOLDER_NAME
from nara_diffusion.tuner.strength.layers import has_strength
from nara_diffusion.tuner.strength.set_strength import roots_of

from .fold import to_lora
from .lora.config import with_ranks_of
from .lora.plain_lora import PlainLora, PlainLoraLayer

_original: Any = None
"""PEFT's own function, once `extend_conversion` has run."""


def extend_conversion() -> None:
    """Make PEFT's function `convert_to_lora`, which `save_as_lora` calls, convert cores. Harmless when repeated.

    Users import that function by name, often before this package. So its code is replaced, not the name in PEFT's
    module: the function object that they imported changes too.
    """
    if getattr(convert_to_lora, "knows_cores", False):
        return
    global _original
    _original = FunctionType(
        convert_to_lora.__code__, convert_to_lora.__globals__, "convert_to_lora", convert_to_lora.__defaults__
    )
    convert_to_lora.__code__ = _entry.__code__
    convert_to_lora.knows_cores = True  # type: ignore[attr-defined]


def _entry(
    model: Any,
    rank: Any,
    adapter_name: Any = "default",
    progressbar: Any = False,
    compile_kwargs: Any = None,
) -> Any:
    """The code that replaces PEFT's. It sees the global names of PEFT's module."""
    from nara_diffusion.export.peft_conversion import convert_adapter

    return convert_adapter(model, rank, adapter_name, progressbar, compile_kwargs)


def convert_adapter(
    model: nn.Module, rank: float, adapter_name: str, progressbar: bool, compile_kwargs: Any
) -> tuple[LoraConfig, dict[str, Tensor]]:
    """As `peft.convert_to_lora`; an adapter with cores is converted at the λ of `with noise_level(model, …)`.

    With cores, `progressbar` and `compile_kwargs` change nothing: there is no large SVD to show or to compile.

    Raises:
        ValueError: `rank` is no int ≥ 1 or float in (0, 1]; λ is needed and not known; see `to_lora` and `truncated`.
    """
    if not _has_cores(model, adapter_name):
        return _original(model, rank, adapter_name, progressbar, compile_kwargs)
    _check_rank(rank)
    lora = truncated(to_lora(model, adapter_name=adapter_name), rank)
    prefix = PEFT_PREFIX if isinstance(model, PeftModel) else ""
    return lora.config, lora.state_dict(prefix)


def _has_cores(model: Any, adapter_name: str) -> bool:
    if not isinstance(model, nn.Module) or not any(hasattr(module, HOLDER_NAME) for module in model.modules()):
        return False
    return any(
        isinstance(root.peft_config[adapter_name], NaraConfig) or has_strength(root, adapter_name)
        for root in roots_of(model, adapter_name)
    )


def _check_rank(rank: Any) -> None:
    is_share = isinstance(rank, float) and 0 < rank <= 1
    is_number = isinstance(rank, int) and not isinstance(rank, bool) and rank >= 1
    if not is_share and not is_number:
        raise ValueError(
            f"rank is {rank!r}: pass an int, 1 or more, or a float in (0, 1], the share of the squared singular values "
            "of ΔW to keep."
        )


def truncated(lora: PlainLora, rank: float) -> PlainLora:
    """`lora` with rank `rank` or less in each layer; a float is the share of ‖ΔW‖² to keep.

    A layer whose rank is not larger keeps its factors as they are.

    Raises:
        ValueError: a layer's rank would fall, and the adapter's initialisation has changed the base (PiSSA, …), or the
            layer is a grouped convolution.
    """
    if isinstance(rank, float) and rank == 1.0:
        return lora
    cut = {name: _cut(name, layer, rank) for name, layer in lora.layers.items()}
    changed = [name for name, layer in cut.items() if layer.rank != lora.layers[name].rank]
    if not changed:
        return lora
    start = lora.config.init_lora_weights
    if isinstance(start, str) and start not in ("gaussian", "orthogonal"):
        raise ValueError(
            f"rank is {rank}, but init_lora_weights={start!r} has changed the base weights by a LoRA of the adapter's "
            "own rank: pass rank=1.0, which keeps that rank."
        )
    return replace(lora, config=with_ranks_of(lora.config, cut), layers=cut, error=None)


def _cut(name: str, layer: PlainLoraLayer, rank: float) -> PlainLoraLayer:
    """B A = U Σ V by QR of both and an SVD (r, r); its leading singular vectors, with √Σ in each factor."""
    if isinstance(rank, int) and rank >= layer.rank:
        return layer
    if layer.B.flatten(1).shape[1] != layer.rank:
        raise ValueError(
            f"rank is {rank}, but '{name}' is a grouped convolution, which can't be truncated: pass rank=1.0, which "
            "keeps its rank."
        )
    left, upper = torch.linalg.qr(layer.B.double().flatten(1))
    right, lower = torch.linalg.qr(layer.A.double().flatten(1).T)
    U, S, Vh = torch.linalg.svd(upper @ lower.T)
    kept = rank if isinstance(rank, int) else _enough(S, rank)
    if kept >= layer.rank:
        return layer
    root = S[:kept].sqrt()
    B = (left @ U[:, :kept] * root).view(len(layer.B), kept, *layer.B.shape[2:])
    A = (root[:, None] * (Vh[:kept] @ right.T)).view(kept, *layer.A.shape[1:])
    dtypes = [torch.promote_types(factor.dtype, torch.float32) for factor in (layer.A, layer.B)]
    alpha = layer.scaling * kept
    return replace(layer, A=A.to(dtypes[0]), B=B.to(dtypes[1]), alpha=alpha, rank=int(kept))


def _enough(S: Tensor, share: float) -> int:
    """The fewest leading singular values that hold this share of the sum of squares."""
    energy = S.square().cumsum(0)
    return min(int(torch.searchsorted(energy, share * energy[-1])) + 1, len(S))
