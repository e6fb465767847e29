"""Read one adapter from a model or a file, with A, B, s, magnitude and C(λ) of each layer.

    ΔW(λ) = s · B · C(λ) · A          A (r, d_in …), B (d_out, r …), C (b, r, r), s a number

C includes a strength that depends on λ. In a layer that reads no core, C is I. At a fixed λ, C can
be folded into B:

    s · B · C(λ) · A  =  α/r · B' · A,        B' = (s r / α) · B · C(λ)

α and r are those of the configuration. If a strength was set, s differs from α/r, and B' includes
the strength too. In a grouped convolution, B is block-diagonal and C is not, so C is folded into A
instead, as A' = (s r / α) · C(λ) · A.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from peft.tuners.lora import LoraConfig, LoraLayer
from peft.tuners.lora.layer import Embedding, LoraVariant, ParamWrapper
from torch import Tensor, nn

from nara_diffusion.config import NaraConfig
from nara_diffusion.cores.core_set import CoreSet, core_group, make_cores
from nara_diffusion.layers.dora import PEFT_DORA
from nara_diffusion.layers.offloading import onloaded
from nara_diffusion.layers.variants import NaraVariant
from nara_diffusion.loaders.adapter_part import AdapterPart, configured_scaling
from nara_diffusion.noise.level import Level, as_level
from nara_diffusion.noise.strength_schedule import StrengthSchedule
from nara_diffusion.strict import adapter_tensors
from nara_diffusion.tuner.holder import holder_of
from nara_diffusion.tuner.inspection import onloaded_cores
from nara_diffusion.tuner.strength import layers_of, roots_of, strength_of
from nara_diffusion.tuner.twins import check_foldable_file

from .plain_lora import PlainLora, PlainLoraLayer, extra_tensors, layers_of_tensors

_EXPORTED = (type(None), NaraVariant, *PEFT_DORA)
"""LoRA variants that a plain LoRA or DoRA can express."""


@dataclass(frozen=True)
class Adapter:
    """One adapter, with copies of its factors on the CPU.

    Attributes:
        config: the adapter's configuration.
        lora: the adapter's modules, ranks, factors and other tensors as a LoRA, without C.
        groups: {module: the group of its core}; the group is None for layers that read no core.
        cores_by_group: the cores, without a strength over λ.
        schedule: the strength over λ, if there is one.
        level_of: a function that converts the given λ to (1,) or (b,), or to None if the cores need
            no λ.
    """

    config: LoraConfig
    lora: PlainLora
    groups: Mapping[str, str | None]
    cores_by_group: CoreSet
    schedule: StrengthSchedule | None
    level_of: Callable[[Level | None], Tensor | None]

    @torch.no_grad()
    def cores(
        self, level: Tensor | None, strength: float = 1.0, device: torch.device | str = "cpu"
    ) -> dict[str, Tensor]:
        """Return {module: strength · C (b or 1, r, r)} at λ (b,), float32, including the schedule.

        Layers that share a core share the memory of its matrix.
        """
        largest = max(layer.rank for layer in self.lora.layers.values())
        matrices: dict[str | None, Tensor] = {None: torch.eye(largest)[None]}
        for group in self.cores_by_group:
            C = self.cores_by_group.matrix(group, level)
            if self.schedule is not None and level is not None:
                C = self.schedule.at(level)[:, None, None].to(C.device) * C
            matrices[group] = C
        matrices = {group: (strength * C).to(device) for group, C in matrices.items()}
        return {
            name: matrices[self.groups[name]][:, : layer.rank, : layer.rank]
            for name, layer in self.lora.layers.items()
        }

    def folded(self, cores: Mapping[str, Tensor]) -> PlainLora:
        """Return the plain LoRA s · B · C · A for the given C (r, r) of each module.

        Products are computed in float64.
        """
        if self.config.lora_bias:
            raise ValueError(
                "The adapter has biases of B (lora_bias=True), which a plain LoRA can't have. Use save_pretrained."
            )
        layers = {}
        for name, layer in self.lora.layers.items():
            scaling = configured_scaling(self.lora.config, name, layer.rank)
            plain = replace(layer, alpha=scaling * layer.rank)
            gain = 1.0 if scaling == layer.scaling else layer.scaling / scaling
            core = gain * cores[name].double()
            if torch.equal(core, torch.eye(layer.rank, dtype=core.dtype)):
                layers[name] = plain
            elif layer.groups > 1 and not layer.is_embedding:
                A = core @ layer.A.double().flatten(1)
                layers[name] = replace(plain, A=_as_stored(A, layer.A))
            else:
                B = layer.B.double().flatten(1) @ core
                layers[name] = replace(plain, B=_as_stored(B, layer.B))
        return replace(self.lora, layers=layers)


def _as_stored(product: Tensor, factor: Tensor) -> Tensor:
    """Return a product in the shape of a factor, in at least float32."""
    return product.view(factor.shape).to(torch.promote_types(factor.dtype, torch.float32))


@contextmanager
def adapter_of_model(model: nn.Module, adapter_name: str) -> Iterator[Adapter]:
    """Yield an adapter of a model, with its cores in memory inside the context.

    Raises:
        ValueError: there is no such adapter, or several models inside `model` have it; the adapter
            is not a LoRA, or its LoRA variant can't be expressed as a plain LoRA; or the weights
            are offloaded or sharded.
    """
    root, *further = roots_of(model, adapter_name)
    if further:
        raise ValueError(
            f"Several models in {type(model).__name__} have an adapter '{adapter_name}'. Pass one of these models."
        )
    config: Any = root.peft_config[adapter_name]
    holder = holder_of(root)
    if not isinstance(config, LoraConfig):
        raise ValueError(
            f"Adapter '{adapter_name}' is a {type(config).__name__.removesuffix('Config')}, and only a NaRA or a LoRA "
            "can be exported exactly. peft.convert_to_lora(model, rank=…) approximates other methods."
        )
    factors: dict[str, PlainLoraLayer] = {}
    groups: dict[str, str | None] = {}
    for name, layer in layers_of(root, adapter_name).items():
        variant = getattr(layer, "lora_variant", {}).get(adapter_name)
        factors[name] = _factors(name, layer, adapter_name, variant)
        groups[name] = variant.key[1] if isinstance(variant, NaraVariant) else None
    tensors = extra_tensors(adapter_tensors(root, adapter_name))
    extra = {key: _copied(tensor, key) for key, tensor in tensors.items()}
    lora = PlainLora(_plain_config(config, root), factors, extra)
    schedule = strength_of(root, adapter_name)
    with onloaded_cores(model):
        if holder is None or adapter_name not in holder.cores:
            yield Adapter(config, lora, groups, CoreSet(), schedule, lambda level: None)
        else:
            yield Adapter(
                config,
                lora,
                groups,
                holder.cores_of(adapter_name),
                schedule,
                lambda level: holder.merging.level_to_export(adapter_name, level, holder.context()),
            )


def _factors(
    name: str, layer: nn.Module, adapter_name: str, variant: LoraVariant | None
) -> PlainLoraLayer:
    """Return copies of a layer's factors.

    Raises:
        ValueError: a plain LoRA can't express the layer, or the layer's weights are offloaded.
    """
    is_lora = isinstance(layer, LoraLayer) and not isinstance(layer, ParamWrapper)
    if not is_lora or not isinstance(variant, _EXPORTED):
        kind = type(layer).__name__
        kind += "" if variant is None else f" with {type(variant).__name__}"
        raise ValueError(
            f"Adapter '{adapter_name}' can't be exported as a plain LoRA, since layer '{name}' is "
            f"adapted by PEFT's {kind}. Use save_pretrained, whose files only PEFT can read."
        )
    adapted: Any = layer
    rank: int = adapted.r[adapter_name]
    is_embedding = isinstance(layer, Embedding)
    magnitude = None
    with onloaded(adapted):
        if is_embedding:
            A, B = adapted.lora_embedding_A[adapter_name], adapted.lora_embedding_B[adapter_name]
        else:
            A, B = adapted.lora_A[adapter_name].weight, adapted.lora_B[adapter_name].weight
        A, B = _copied(A, name), _copied(B, name)
        if adapter_name in adapted.lora_magnitude_vector:
            magnitude = _copied(adapted.lora_magnitude_vector[adapter_name].weight, name)
    groups = getattr(adapted.get_base_layer(), "groups", 1)
    return PlainLoraLayer(
        A=A[:rank].clone(),  # hotswap may have padded A to a larger rank
        B=B[:, : rank // groups].clone(),
        alpha=float(adapted.scaling[adapter_name]) * rank,
        rank=rank,
        magnitude=magnitude,
        is_embedding=is_embedding,
    )


def _copied(tensor: Tensor, name: str) -> Tensor:
    if tensor.is_meta:
        raise ValueError(
            f"The adapter's weights of layer '{name}' are offloaded. Export the adapter before offloading."
        )
    return tensor.detach().to("cpu", copy=True).contiguous()


def _plain_config(config: LoraConfig, root: nn.Module | None = None) -> LoraConfig:
    """Return a LoraConfig with an adapter's modules, ranks, scales and, if known, its base.

    Raises:
        ValueError: the core is "film", which is more than a matrix.
    """
    if getattr(config, "core_type", None) == "film":
        raise ValueError(
            "The adapter has core_type 'film' (Tc-LoRA), whose β(λ) no plain LoRA has. Load it with "
            "pipe.load_nara_weights or PeftModel.from_pretrained."
        )
    names = [field.name for field in fields(LoraConfig) if field.init]
    values = {name: copy.copy(getattr(config, name)) for name in names}
    values["inference_mode"] = True
    if root is not None:
        base = config.base_model_name_or_path or getattr(root, "name_or_path", None)
        values["base_model_name_or_path"] = base or None
        if config.task_type is None and config.auto_mapping is None:
            # AutoPeftModel needs this; PEFT's save_pretrained does the same
            values["auto_mapping"] = {
                "base_model_class": type(root).__name__,
                "parent_library": type(root).__module__,
            }
    return LoraConfig(**values)


def adapter_of_part(part: AdapterPart) -> Adapter:
    """Return the adapter of a file that `AdapterFile.read` has checked.

    The factors are in at least float32.

    Raises:
        ValueError: the adapter is for DiffusionGemma.
    """
    check_foldable_file(part.config)
    config, cores, schedule = part.config, cores_of(part), schedule_of(part.config)
    tensors = {
        key: tensor if tensor.dtype == torch.float64 else tensor.float()
        for key, tensor in part.tensors.items()
    }
    layers = layers_of_tensors(config, tensors)
    groups = {
        name: core_group(config, name, layer.rank) if config.reads_core else None
        for name, layer in layers.items()
    }

    def level_of(level: Level | None) -> Tensor | None:
        if not cores.needs_noise and schedule is None:
            return None
        if level is None:
            raise ValueError("The adapter depends on λ. Give a λ.")
        return as_level(level)

    lora = PlainLora(_plain_config(config), layers, extra_tensors(part.tensors))
    return Adapter(config, lora, groups, cores, schedule, level_of)


def schedule_of(config: NaraConfig) -> StrengthSchedule | None:
    """Return the strength over λ that a configuration sets, if any."""
    points: Any = config.strength
    return None if points is None else StrengthSchedule(points)


def cores_of(part: AdapterPart) -> CoreSet:
    """Return the cores that a file contains, with their values loaded."""
    cores = make_cores(part.config, part.core_ranks)
    cores.load_state_dict(part.core)
    return cores
