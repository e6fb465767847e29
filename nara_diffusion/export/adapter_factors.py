"""One adapter of a model or of a file: the factors A, B, s and the magnitude of each layer, and C(λ).

    ΔW(λ) = s · B · C(λ) · A          A (r, d_in …), B (d_out, r …), C (b, r, r), s a number

C includes a strength that depends on λ. It is I in a layer that reads no core. C at one λ is multiplied into B:

    s · B · C(λ) · A  =  α/r · B' · A,        B' = (s r / α) · B · C(λ)

α and r are those of the configuration. s differs from α/r where a strength was set, which then goes into B' too. In a
grouped convolution B is block-diagonal and C is not, so there A' = (s r / α) · C(λ) · A.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from functools import partial
from typing import Any

import torch
from peft.tuners.lora import LoraConfig, LoraLayer
from peft.tuners.lora.layer import Embedding, ParamWrapper
from torch import Tensor, nn

from nara_diffusion.config import NaraConfig
from nara_diffusion.cores.registry import CoreSet, core_group, make_cores
from nara_diffusion.layers.dispatch import PEFT_DORA
from nara_diffusion.layers.offloading import onloaded
from nara_diffusion.layers.variants import NaraVariant
from nara_diffusion.loaders.adapter_part import AdapterPart, configured_scaling
from nara_diffusion.noise.level import Level, as_level
from nara_diffusion.noise.strength_schedule import StrengthSchedule
from nara_diffusion.strict import adapter_tensors
from nara_diffusion.tuner.holder import holder_of
from nara_diffusion.tuner.inspection import onloaded_cores
from nara_diffusion.tuner.strength import layers_of, roots_of, strength_of

from .plain_lora import PlainLora, PlainLoraLayer, layers_of_tensors, others_of


@dataclass(frozen=True)
class Adapter:
    """One adapter, with copies of its factors on the CPU.

    Attributes:
        config: its configuration.
        lora: its modules, ranks, factors and further tensors as those of a LoRA, without C.
        keys: {module: what its core is made by}; None for layers that read no core.
        make: (key, λ (b,)) → C (b or 1, r, r), float32.
        level_of: λ as given → λ (1,) or (b,), None if the cores need none.
        schedules: the strengths over λ that are part of C.
    """

    config: LoraConfig
    lora: PlainLora
    keys: dict[str, Any]
    make: Callable[[Any, Tensor | None], Tensor]
    level_of: Callable[[Level | None], Tensor | None]
    schedules: set[StrengthSchedule]

    def cores(
        self, level: Tensor | None, strength: float = 1.0, device: Any = "cpu"
    ) -> dict[str, Tensor]:
        """{module: strength · C (b or 1, r, r)} at λ (b,), float32. Layers that share a core share its memory."""
        with torch.no_grad():
            made = {
                key: self.make(key, level)
                for key in dict.fromkeys(self.keys.values())
                if key is not None
            }
        ranks = {name: layer.rank for name, layer in self.lora.layers.items()}
        made[None] = torch.eye(max(ranks.values(), default=0))[None]
        made = {key: (strength * C).to(device) for key, C in made.items()}
        return {name: made[self.keys[name]][:, :rank, :rank] for name, rank in ranks.items()}

    def folded(self, cores: Mapping[str, Tensor]) -> PlainLora:
        """The plain LoRA s · B · C · A with that C (r, r) of each module."""
        if self.config.lora_bias:
            raise ValueError(
                "The adapter has biases of B (lora_bias=True): save it by save_pretrained."
            )
        layers = {
            name: _folded(name, layer, cores[name], self.lora.config)
            for name, layer in self.lora.layers.items()
        }
        return replace(self.lora, layers=layers)


def _folded(name: str, layer: PlainLoraLayer, core: Tensor, config: LoraConfig) -> PlainLoraLayer:
    """s · B · C · A of one layer as α/r · B' · A'; products in float64, which are kept in float32 or better."""
    scaling = configured_scaling(config, name, layer.rank)
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


# ---------------------------------------------------------------------- of a model


@contextmanager
def adapter_of_model(model: nn.Module, adapter_name: str) -> Iterator[Adapter]:
    """Read an adapter of a model. Inside the context, its cores are in memory.

    Raises:
        ValueError: no such adapter, or several models inside of `model` have it; another method than LoRA, or a LoRA
            variant that can't be a plain LoRA; the weights are offloaded or sharded.
    """
    root, *others = roots_of(model, adapter_name)
    if others:
        raise ValueError(
            f"Several models below {type(model).__name__} have '{adapter_name}': pass the one meant."
        )
    config: Any = root.peft_config[adapter_name]
    holder: Any = holder_of(root)
    if not isinstance(config, LoraConfig):
        raise ValueError(
            f"Adapter '{adapter_name}' is a {type(config).__name__.removesuffix('Config')}: only a NaRA or a LoRA can "
            "be exported exactly. peft.convert_to_lora(model, rank=…) approximates other methods."
        )
    layers = layers_of(root, adapter_name)
    factors = {name: _factors(name, layer, adapter_name) for name, layer in layers.items()}
    variants = {name: layer.lora_variant.get(adapter_name) for name, layer in layers.items()}
    keys = {
        name: each.key if isinstance(each, NaraVariant) else None for name, each in variants.items()
    }
    make: Any = None
    level_of: Any = lambda _: None  # noqa: E731
    if holder is not None and adapter_name in holder.cores:
        make, level_of = holder.matrix, partial(holder.level_to_export, adapter_name)
    extra = {
        key: _copied(t, key) for key, t in others_of(adapter_tensors(root, adapter_name)).items()
    }
    lora = PlainLora(_plain_config(config, root), factors, extra)
    with onloaded_cores(model):
        yield Adapter(
            config, lora, keys, make, level_of, set(filter(None, [strength_of(root, adapter_name)]))
        )


def _factors(name: str, layer: Any, adapter_name: str) -> PlainLoraLayer:
    variant, kind = getattr(layer, "lora_variant", {}).get(adapter_name), type(layer)
    is_lora = issubclass(kind, LoraLayer) and not issubclass(kind, ParamWrapper)
    if not is_lora or not isinstance(variant, (type(None), NaraVariant, *PEFT_DORA)):
        raise ValueError(
            f"Adapter '{adapter_name}' can't be exported as a plain LoRA, since layer '{name}' is adapted by PEFT's "
            f"{kind.__name__}{'' if variant is None else f' with {type(variant).__name__}'}: save it by "
            "save_pretrained, for PEFT only."
        )
    rank, is_embedding, vectors = (
        layer.r[adapter_name],
        issubclass(kind, Embedding),
        layer.lora_magnitude_vector,
    )
    with onloaded(layer):
        if is_embedding:
            A, B = layer.lora_embedding_A[adapter_name], layer.lora_embedding_B[adapter_name]
        else:
            A, B = layer.lora_A[adapter_name].weight, layer.lora_B[adapter_name].weight
        A, B = _copied(A, name), _copied(B, name)
        magnitude = _copied(vectors[adapter_name].weight, name) if adapter_name in vectors else None
    groups = getattr(layer.get_base_layer(), "groups", 1)
    A, B = A[:rank].clone(), B[:, : rank // groups].clone()  # hotswap makes room for larger ranks
    return PlainLoraLayer(
        A, B, float(layer.scaling[adapter_name]) * rank, rank, magnitude, is_embedding
    )


def _copied(tensor: Tensor, name: str) -> Tensor:
    if tensor.is_meta:
        raise ValueError(
            f"The adapter's weights of layer '{name}' are offloaded: export before offloading."
        )
    return tensor.detach().to("cpu", copy=True).contiguous()


def _plain_config(config: LoraConfig, root: Any = None) -> LoraConfig:
    """The LoraConfig with the modules, ranks and scales of an adapter's `config`; it names the base, if known."""
    given = {
        field.name: copy.copy(getattr(config, field.name))
        for field in fields(LoraConfig)
        if field.init
    }
    given["inference_mode"] = True
    if root is not None:
        given["base_model_name_or_path"] = (
            config.base_model_name_or_path or getattr(root, "name_or_path", None) or None
        )
        if (
            config.task_type is None and config.auto_mapping is None
        ):  # as PEFT's save_pretrained, for AutoPeftModel
            given["auto_mapping"] = {
                "base_model_class": type(root).__name__,
                "parent_library": type(root).__module__,
            }
    return LoraConfig(**given)


# ---------------------------------------------------------------------- of a file


def adapter_of_part(part: AdapterPart) -> Adapter:
    """The adapter of a file, which `AdapterFile.read` has checked; its factors in float32 or better."""
    config, cores, schedule = part.config, cores_of(part), schedule_of(part.config)
    tensors = {key: t if t.dtype == torch.float64 else t.float() for key, t in part.tensors.items()}
    layers = layers_of_tensors(config, tensors)
    keys = {
        name: core_group(config, name, layer.rank) if config.reads_core else None
        for name, layer in layers.items()
    }

    def make(group: str, level: Tensor | None) -> Tensor:
        C = cores.matrix(group, level)
        return C if schedule is None or level is None else schedule.at(level)[:, None, None] * C

    def level_of(level: Level | None) -> Tensor | None:
        if not cores.needs_noise and schedule is None:
            return None
        if level is None:
            raise ValueError("the adapter depends on λ: name it.")
        return as_level(level)

    lora = PlainLora(_plain_config(config), layers, others_of(part.tensors))
    return Adapter(config, lora, keys, make, level_of, set() if schedule is None else {schedule})


def schedule_of(config: NaraConfig) -> StrengthSchedule | None:
    """The strength over λ that a configuration sets."""
    return None if config.strength is None else StrengthSchedule(config.strength)  # type: ignore[arg-type]


def cores_of(part: AdapterPart) -> CoreSet:
    """The cores of a file, with its values."""
    cores = make_cores(part.config, part.core_ranks)
    cores.load_state_dict(part.core)
    return cores
