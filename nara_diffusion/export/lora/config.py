"""The LoraConfig of an exported adapter: the NaRA's, without the fields of the core."""

from __future__ import annotations

import copy
import math
import re
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Set
from dataclasses import fields
from typing import Any

from peft import LoraConfig
from peft.tuners.tuners_utils import BaseTunerLayer, check_target_module_exists
from torch import nn

from nara_diffusion.loaders.file import by_pattern
from nara_diffusion.utils.listing import listed


def base_modules(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """(name, module) of the base model's modules, adapted ones as their tuner layers; no adapters, no cores."""
    left = [("", model)]
    while left:
        prefix, module = left.pop()
        for name, child in module._modules.items():
            if child is None or getattr(type(child), "is_core_holder", False):
                continue
            path = f"{prefix}{name}"
            yield path, child
            if not isinstance(child, BaseTunerLayer):
                left.append((f"{path}.", child))


def check_has_modules(model: nn.Module, names: Set[str], origin: str) -> None:
    """Raises ValueError if `model` lacks one of the modules that the adapter of `origin` adapts."""
    unknown = sorted(names - {name for name, _ in base_modules(model)})
    if unknown:
        raise ValueError(
            f"{origin} adapts {len(names)} modules, of which {type(model).__name__} lacks {len(unknown)}: "
            f"{listed(unknown)}. It was trained on another base model, or belongs to another component of the pipeline."
        )


_SELECTS = ("exclude_modules", "layers_to_transform", "layers_pattern")


def plain_config(root: nn.Module, config: LoraConfig, ranks: Mapping[str, int]) -> LoraConfig:
    """The LoraConfig with the modules, ranks and scales of an adapter's `config`.

    Args:
        root: the adapted model. config: of its adapter. ranks: {adapted module: its rank}.
    """
    given = {field.name: copy.copy(getattr(config, field.name)) for field in fields(LoraConfig) if field.init}
    base = config.base_model_name_or_path or getattr(root, "name_or_path", None) or None
    given |= {"inference_mode": True, "base_model_name_or_path": base}
    is_known = config.auto_mapping is not None or type(root) is nn.Module  # the latter stands for a file's base
    if config.task_type is None and not is_known:  # as PEFT's save_pretrained, for AutoPeftModel
        given["auto_mapping"] = {"base_model_class": type(root).__name__, "parent_library": type(root).__module__}
    return fitting_config(LoraConfig(**given), root, ranks)


def configured_scaling(config: LoraConfig, name: str, rank: int) -> float:
    """α / r, or α / √r for rsLoRA, of the module of that name."""
    alpha = by_pattern(config.alpha_pattern, name, config.lora_alpha)  # type: ignore[arg-type]
    return alpha / (math.sqrt(rank) if config.use_rslora else rank)


def _selects(config: LoraConfig, modules: Collection[str], ranks: Mapping[str, int]) -> bool:
    """Whether PEFT, by `config`, adapts exactly the modules in `ranks`, at those ranks."""
    inner = {name for name in ranks if name not in modules}  # inside of attention, which PEFT wraps as one module
    selected = {name for name in modules if check_target_module_exists(config, name)}
    if selected != ranks.keys() - inner:
        return False
    return all(by_pattern(config.rank_pattern, name, config.r) == ranks[name] for name in selected)  # type: ignore[arg-type]


def _explicit(config: LoraConfig, modules: Collection[str], ranks: Mapping[str, int]) -> LoraConfig:
    """The configuration with the full name of each module in target_modules, rank_pattern and alpha_pattern."""
    plain = copy.copy(config)
    for name in _SELECTS:
        setattr(plain, name, None)
    alphas = {name: by_pattern(config.alpha_pattern, name, config.lora_alpha) for name in ranks}  # type: ignore[arg-type]
    _set_patterns(plain, ranks, alphas)
    plain.target_modules = sorted(ranks)
    if not _selects(plain, modules, ranks):  # a full name is the end of another module's name, too
        plain.target_modules = "|".join(map(re.escape, sorted(ranks)))
    return plain


def _most_common(values: Collection[Any]) -> Any:
    return Counter(values).most_common(1)[0][0]


def with_ranks_of(config: LoraConfig, layers: Mapping[str, Any]) -> LoraConfig:
    """`config` with the ranks and α of `layers`, {module: PlainLoraLayer}; α / rank is the scale (no rsLoRA)."""
    changed = copy.copy(config)
    changed.use_rslora = False
    _set_patterns(
        changed,
        {name: layer.rank for name, layer in layers.items()},
        {name: layer.alpha for name, layer in layers.items()},
    )
    return changed


def _set_patterns(config: LoraConfig, ranks: Mapping[str, int], alphas: Mapping[str, Any]) -> None:
    """Set r, lora_alpha and their patterns, by full names of modules."""
    config.r, config.lora_alpha = _most_common(ranks.values()), _most_common(alphas.values())
    config.rank_pattern, config.alpha_pattern = _exceptions(ranks, config.r), _exceptions(alphas, config.lora_alpha)


def _exceptions(values: Mapping[str, Any], default: Any) -> dict[str, Any]:
    return {f"^{re.escape(name)}": value for name, value in values.items() if value != default}


def config_of_layers(layers: Mapping[str, Any]) -> LoraConfig:
    """A LoraConfig for factors that came without one. `layers`: {module: PlainLoraLayer}."""
    first = next(iter(layers.values()))
    config = LoraConfig(
        target_modules=sorted(layers),
        use_dora=first.magnitude is not None,
        lora_bias=first.bias is not None,
        inference_mode=True,
    )
    return with_ranks_of(config, layers)


def fitting_config(config: LoraConfig, root: nn.Module, ranks: Mapping[str, int]) -> LoraConfig:
    """`config` if it selects exactly the modules in `ranks` at those ranks, or else one that does."""
    modules = [name for name, _ in base_modules(root)]
    return config if _selects(config, modules, ranks) else _explicit(config, modules, ranks)
