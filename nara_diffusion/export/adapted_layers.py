"""The factors of one adapter of a model, layer by layer: A, B, C(λ), s and the magnitude.

    ΔW(λ) = s · B · C(λ) · A          A (r, d_in …), B (d_out, r …), C (b, r, r), s a number

C includes a strength that depends on λ. It is I in a layer that reads no core.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from peft.tuners.lora import LoraConfig, LoraLayer
from peft.tuners.lora.layer import Embedding, ParamWrapper, _ConvNd
from peft.tuners.lora.variants import DoraLinearVariant, _DoraConvNdVariant
from torch import Tensor, nn

from nara_diffusion.layers.effective_weights import effective_weight
from nara_diffusion.layers.variants import NaraVariant
from nara_diffusion.noise.signals import Level, NoiseSignals
from nara_diffusion.runtime.offloading import is_sharded, onloaded, onloaded_cores
from nara_diffusion.tuner.holder.core_holder import CoreHolder, holder_of
from nara_diffusion.tuner.strength.layers import layers_of
from nara_diffusion.tuner.strength.set_strength import roots_of

_SPREAD = ("target_parameters", "layer_replication", "megatron_config")
"""Options of LoraConfig by which layers have no A and B of their own."""


@dataclass(frozen=True)
class AdaptedLayer:
    """One layer's share of the adapter; tensors are copies on the CPU.

    Attributes:
        name: the name of the module in the adapted model.
        A: (r, d_in), in a convolution (r, d_in, *kernel), in an embedding (r, n).
        B: (d_out, r), in a convolution (d_out, r / groups, 1, …).
        bias: of B (d_out,), or None. magnitude: DoRA's, or None. scaling: s.
        key: the key by which the layer reads its core; None if it reads none, and C = I.
    """

    name: str
    A: Tensor
    B: Tensor
    bias: Tensor | None
    magnitude: Tensor | None
    rank: int
    scaling: float
    groups: int
    is_embedding: bool
    key: tuple[str, str] | None


@dataclass(frozen=True)
class Adapter:
    """One adapter of one model.

    Attributes:
        root: the adapted model, without a PeftModel around it.
        name: the name of the adapter. config: its configuration. layers: its layers.
    """

    root: nn.Module
    name: str
    config: LoraConfig
    layers: list[AdaptedLayer]

    @property
    def holder(self) -> CoreHolder | None:
        """The module that owns the cores; None if the model has none."""
        return holder_of(self.root)

    def signals(self, noise_level: Level | None, mask_density: Level | None = None) -> NoiseSignals | None:
        """λ and mask density of one sample; None if the adapter has no core.

        Raises:
            ValueError: the adapter depends on one of them, and it is not known.
        """
        holder = self.holder
        if holder is None or self.name not in holder.cores:
            return None
        return holder.signals_to_export(self.name, noise_level, mask_density)

    def core(self, layer: AdaptedLayer, signals: NoiseSignals | None) -> Tensor:
        """C (b or 1, r, r) at λ (b,), float32, on the CPU."""
        if layer.key is None:
            return torch.eye(layer.rank)[None]
        assert self.holder is not None
        return self.holder.core_to_export(layer.key, signals)[:, : layer.rank, : layer.rank].cpu()


@contextmanager
def read_adapter(model: nn.Module, adapter_name: str) -> Iterator[Adapter]:
    """Read an adapter. Inside the context, the values of its cores are in memory.

    Raises:
        ValueError: no such adapter, or several models inside of `model` have it; another method than LoRA, or a LoRA
            variant that can't be a plain LoRA; the weights are offloaded or sharded.
    """
    root = _root_of(model, adapter_name)
    config = root.peft_config[adapter_name]
    _check_config(config, adapter_name)
    layers = layers_of(root, adapter_name)
    with onloaded_cores(model):
        yield Adapter(root, adapter_name, config, [_read(name, layers[name], adapter_name) for name in layers])


def _root_of(model: nn.Module, adapter_name: str) -> Any:
    roots = roots_of(model, adapter_name)
    if len(roots) > 1:
        kinds = ", ".join(type(root).__name__ for root in roots)
        raise ValueError(
            f"{len(roots)} models inside of {type(model).__name__} have an adapter {adapter_name!r} ({kinds}): pass "
            "one of them."
        )
    return roots[0]


def _check_config(config: Any, adapter_name: str) -> None:
    if not isinstance(config, LoraConfig):
        raise ValueError(
            f"Adapter '{adapter_name}' is a {type(config).__name__.removesuffix('Config')}: only a NaRA or a LoRA can "
            "be exported exactly. peft.convert_to_lora(model, rank=…) approximates other methods."
        )
    for field in _SPREAD:
        if getattr(config, field, None):
            raise ValueError(_refusal(adapter_name, f"{field}={getattr(config, field)!r}"))


def _read(name: str, layer: Any, adapter_name: str) -> AdaptedLayer:
    variant = getattr(layer, "lora_variant", {}).get(adapter_name)
    _check_layer(name, layer, variant, adapter_name)
    with onloaded(layer):
        A, B, bias, magnitude = (None if t is None else _copied(t, name) for t in _tensors(layer, adapter_name))
    assert A is not None
    assert B is not None
    groups = getattr(layer.get_base_layer(), "groups", 1) if isinstance(layer, _ConvNd) else 1
    rank = layer.r[adapter_name]
    return AdaptedLayer(
        name,
        A[:rank].clone(),  # hotswap makes room for larger ranks
        B[:, : rank // groups].clone(),
        bias,
        magnitude,
        rank,
        float(layer.scaling[adapter_name]),
        groups,
        isinstance(layer, Embedding),
        variant.key if isinstance(variant, NaraVariant) else None,
    )


def _tensors(layer: Any, adapter_name: str) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    vectors = layer.lora_magnitude_vector
    magnitude = vectors[adapter_name].weight if adapter_name in vectors else None
    if isinstance(layer, Embedding):
        return layer.lora_embedding_A[adapter_name], layer.lora_embedding_B[adapter_name], None, magnitude
    A, B = layer.lora_A[adapter_name], layer.lora_B[adapter_name]
    return effective_weight(A), effective_weight(B), B.bias, magnitude


def _copied(tensor: Tensor, name: str) -> Tensor:
    if tensor.is_meta:
        raise ValueError(
            f"The adapter's weights of layer '{name}' are offloaded: export before offloading, or load the adapter "
            "into a model in memory."
        )
    return tensor.detach().to("cpu", copy=True).contiguous()


def _check_layer(name: str, layer: Any, variant: Any, adapter_name: str) -> None:
    kind = type(layer).__name__
    if is_sharded(layer):
        raise ValueError(
            f"Layer '{name}' is sharded across processes: save the adapter, load it in one process and export there."
        )
    if not isinstance(layer, LoraLayer) or isinstance(layer, ParamWrapper):
        raise ValueError(_refusal(adapter_name, f"layer '{name}', which is adapted by PEFT's {kind}"))
    if variant is not None and not isinstance(variant, (NaraVariant, DoraLinearVariant, _DoraConvNdVariant)):
        raise ValueError(_refusal(adapter_name, f"layer '{name}', whose LoRA variant is {type(variant).__name__}"))


def _refusal(adapter_name: str, what: str) -> str:
    return (
        f"Adapter '{adapter_name}' can't be exported as a plain LoRA, since it has {what}: save it by "
        "save_pretrained, for PEFT only."
    )
