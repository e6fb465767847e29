"""The factors of one adapter, of a model or of a file: A, B, s and the magnitude of each layer, and C(λ).

    ΔW(λ) = s · B · C(λ) · A          A (r, d_in …), B (d_out, r …), C (b, r, r), s a number

C includes a strength that depends on λ. It is I in a layer that reads no core.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, fields
from functools import partial
from typing import Any

import torch
from peft.tuners.lora import LoraConfig, LoraLayer
from peft.tuners.lora.layer import Embedding, ParamWrapper
from peft.tuners.lora.variants import DoraLinearVariant, _DoraConvNdVariant
from torch import Tensor, nn

from nara_diffusion.config import NaraConfig
from nara_diffusion.layers.offloading import onloaded
from nara_diffusion.layers.variants import NaraVariant
from nara_diffusion.loaders.file import AdapterPart, by_pattern, configured_scaling
from nara_diffusion.loaders.strict import held_tensors, is_core_key
from nara_diffusion.noise.level import Level, NoiseSignals, as_signals
from nara_diffusion.noise.strength_schedule import StrengthSchedule
from nara_diffusion.tuner.core_set import CoreSet, core_group, make_cores
from nara_diffusion.tuner.holder import holder_of
from nara_diffusion.tuner.inspection import onloaded_cores
from nara_diffusion.tuner.strength import layers_of, live_strengths, roots_of

from .plain_lora import PlainLoraLayer


@dataclass(frozen=True)
class Adapter:
    """One adapter, with copies of its factors on the CPU.

    Attributes:
        name: in its model. config: its configuration. plain_config: that of a LoRA with its modules and ranks.
        layers: {module: A, B, s and so on}; alpha / rank is s.
        keys: {module: what its core is made by}; None for layers that read no core.
        make: (key, signals of b samples) → C (b or 1, r, r), float32.
        signals_of: (λ, mask density) → the signals that the cores need, None if they need none.
        schedules: the strengths over λ that are part of C.
        others: tensors that are no factors and no core's, by PEFT's keys.
    """

    name: str
    config: LoraConfig
    plain_config: LoraConfig
    layers: dict[str, PlainLoraLayer]
    keys: dict[str, Any]
    make: Callable[[Any, NoiseSignals | None], Tensor]
    signals_of: Callable[[Level | None, Level | None], NoiseSignals | None]
    schedules: set[StrengthSchedule]
    others: dict[str, Tensor]

    def core(self, module: str, signals: NoiseSignals | None) -> Tensor:
        """C (b or 1, r, r) of a layer at λ (b,), float32, on the CPU."""
        rank = self.layers[module].rank
        if self.keys[module] is None:
            return torch.eye(rank)[None]
        with torch.no_grad():
            return self.make(self.keys[module], signals)[:, :rank, :rank].cpu()


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
        raise ValueError(f"Several models below {type(model).__name__} have '{adapter_name}': pass the one meant.")
    config: Any = root.peft_config[adapter_name]
    holder: Any = holder_of(root)
    if not isinstance(config, LoraConfig):
        raise ValueError(
            f"Adapter '{adapter_name}' is a {type(config).__name__.removesuffix('Config')}: only a NaRA or a LoRA can "
            "be exported exactly. peft.convert_to_lora(model, rank=…) approximates other methods."
        )
    found = {name: _read(name, layer, adapter_name) for name, layer in layers_of(root, adapter_name).items()}
    make: Any = _none
    signals_of: Any = _none
    if holder is not None and adapter_name in holder.cores:
        make, signals_of = holder.matrix, partial(holder.signals_to_export, adapter_name)
    with onloaded_cores(model):
        yield Adapter(
            adapter_name,
            config,
            _plain_config(config, root),
            {name: layer for name, (layer, _) in found.items()},
            {name: key for name, (_, key) in found.items()},
            make,
            signals_of,
            set(live_strengths(root, adapter_name).values()),
            {key: _copied(t, key) for key, t in others_of(held_tensors(root, adapter_name)).items()},
        )


def _none(*_: Any) -> None:
    """Of an adapter without cores."""


def _read(name: str, module: Any, adapter_name: str) -> tuple[PlainLoraLayer, Any]:
    """The factors of a layer, and what its core is made by."""
    layer: Any = module
    variant = getattr(layer, "lora_variant", {}).get(adapter_name)
    is_lora = isinstance(module, LoraLayer) and not isinstance(module, ParamWrapper)
    if not is_lora or not isinstance(variant, (type(None), NaraVariant, DoraLinearVariant, _DoraConvNdVariant)):
        raise ValueError(
            f"Adapter '{adapter_name}' can't be exported as a plain LoRA, since layer '{name}' is adapted by PEFT's "
            f"{type(layer).__name__}{'' if variant is None else f' with {type(variant).__name__}'}: save it by "
            "save_pretrained, for PEFT only."
        )
    rank, is_embedding = layer.r[adapter_name], isinstance(module, Embedding)
    vectors = layer.lora_magnitude_vector
    with onloaded(layer):
        magnitude = vectors[adapter_name].weight if adapter_name in vectors else None
        if is_embedding:
            A, B = layer.lora_embedding_A[adapter_name], layer.lora_embedding_B[adapter_name]
        else:
            A, B = layer.lora_A[adapter_name].weight, layer.lora_B[adapter_name].weight
        found: Any = [None if tensor is None else _copied(tensor, name) for tensor in (A, B, magnitude)]
    groups = getattr(layer.get_base_layer(), "groups", 1)
    A, B = found[0][:rank].clone(), found[1][:, : rank // groups].clone()  # hotswap makes room for larger ranks
    alpha = float(layer.scaling[adapter_name]) * rank
    key = variant.key if isinstance(variant, NaraVariant) else None
    return PlainLoraLayer(A, B, alpha, rank, found[2], is_embedding), key


def _copied(tensor: Tensor, name: str) -> Any:
    if tensor.is_meta:
        raise ValueError(f"The adapter's weights of layer '{name}' are offloaded: export before offloading.")
    return tensor.detach().to("cpu", copy=True).contiguous()


def others_of(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What is no factor and no core's: trained biases, tokens, modules."""
    return {key: tensor for key, tensor in tensors.items() if ".lora_" not in key and not is_core_key(key)}


def _plain_config(config: LoraConfig, root: Any = None) -> LoraConfig:
    """The LoraConfig with the modules, ranks and scales of an adapter's `config`; it names the base, if known."""
    given = {field.name: copy.copy(getattr(config, field.name)) for field in fields(LoraConfig) if field.init}
    given["inference_mode"] = True
    if root is not None:
        given["base_model_name_or_path"] = config.base_model_name_or_path or getattr(root, "name_or_path", None) or None
        if config.task_type is None and config.auto_mapping is None:  # as PEFT's save_pretrained, for AutoPeftModel
            given["auto_mapping"] = {"base_model_class": type(root).__name__, "parent_library": type(root).__module__}
    return LoraConfig(**given)


# ---------------------------------------------------------------------- of a file


def adapter_of_part(part: AdapterPart) -> Adapter:
    """The adapter of a file, without its base model; its factors in float32 or better.

    Raises:
        ValueError: A and B of a module are not both there, or not of the configuration's rank, or the core's tensors
            are not those that it describes: damaged.
    """
    kept = {key: t.to(torch.promote_types(t.dtype, torch.float32)) for key, t in part.tensors.items()}
    config, layers = part.config, layers_of_tensors(part.config, kept)
    cores = cores_of(part)
    schedule = None if config.strength is None else StrengthSchedule(config.strength)  # type: ignore[arg-type]
    keys = {name: core_group(config, name, layer.rank) if config.reads_core else None for name, layer in layers.items()}

    def make(group: str, signals: NoiseSignals | None) -> Tensor:
        C = cores.matrix(group, signals)
        return C if signals is None else strength_of(config, signals.noise_level)[:, None, None] * C

    def signals_of(level: Level | None, density: Level | None) -> NoiseSignals | None:
        if not cores.needs_noise and schedule is None:
            return None
        if level is None or (cores.needs_density and density is None):
            raise ValueError(f"the adapter depends on {'λ' if level is None else 'the mask density'}: name it.")
        return as_signals(level, density)

    schedules = set() if schedule is None else {schedule}
    return Adapter(
        "default", config, _plain_config(config), layers, keys, make, signals_of, schedules, others_of(part.tensors)
    )


def strength_of(config: NaraConfig, noise_level: Tensor) -> Tensor:
    """The strength (b,) at λ (b,) that a configuration sets."""
    if config.strength is None:
        return torch.ones_like(noise_level)
    return StrengthSchedule(config.strength).at(noise_level)  # type: ignore[arg-type]


def cores_of(part: AdapterPart) -> CoreSet:
    """The cores of a file, with its values.

    Raises:
        ValueError: the file lacks tensors of the cores that its configuration describes, or has others.
    """
    groups: dict[str, int] = {}
    for name, rank in part.modules.items():
        group = core_group(part.config, name, rank)
        groups[group] = max(rank, groups.get(group, 0))
    cores = make_cores(part.config, groups)
    try:
        cores.load_state_dict(part.core)
    except RuntimeError as error:
        text = " ".join(str(error).split())
        raise ValueError(f"its cores don't match its configuration, so the file is damaged: {text}") from None
    return cores


def layers_of_tensors(config: LoraConfig, tensors: Mapping[str, Tensor]) -> dict[str, PlainLoraLayer]:
    """{module: its factors} of tensors by PEFT's keys; those that are no factors are left out.

    Raises:
        ValueError: A and B of a module are not both there, not of the configuration's rank, or have a magnitude where
            use_dora says none.
    """
    found: dict[str, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        name, is_factor, kind = key.partition(".lora_")
        if is_factor:
            found.setdefault(name, {})[kind.removesuffix(".weight")] = tensor
    layers = {}
    for name, own in found.items():
        is_embedding = "embedding_A" in own or "embedding_B" in own
        A, B = (own.get(f"embedding_{letter}" if is_embedding else letter) for letter in "AB")
        rank = by_pattern(config.rank_pattern, name, config.r)
        if A is None or B is None:
            raise ValueError(f"'{name}' needs A and B, but {'A' if A is None else 'B'} is missing: damaged.")
        fits = A.dim() >= 2 and B.dim() >= 2 and len(A) == rank and B.shape[1] > 0 and not rank % B.shape[1]
        if not fits:  # the groups of a convolution divide r
            raise ValueError(f"'{name}' has A {tuple(A.shape)} and B {tuple(B.shape)}, expected rank {rank}: damaged.")
        if ("magnitude_vector" in own) != bool(config.use_dora) or own.keys() - _KINDS - (
            {"B.bias"} if config.lora_bias else set()
        ):
            raise ValueError(f"'{name}' has {', '.join(sorted(own))}, but use_dora={config.use_dora}: damaged.")
        alpha = configured_scaling(config, name, rank) * rank
        layers[name] = PlainLoraLayer(A, B, alpha, rank, own.get("magnitude_vector"), is_embedding)
    return layers


_KINDS = {"A", "B", "embedding_A", "embedding_B", "magnitude_vector"}
