"""`NaraModel`: PEFT's LoRA tuner, whose layers read C(λ) from a core at the adapted model's root."""

from __future__ import annotations

from contextlib import nullcontext
from copy import copy
from typing import Any

import torch
from peft.tuners.lora import LoraLayer
from peft.tuners.tuners_utils import (
    _filter_state_dict_by_key_prefixes,
    _get_tuner_state_dict_key_prefixes,
)
from peft.utils.save_and_load import _filter_state_dict_for_adapter_name
from torch import Tensor, nn

from nara_diffusion.config import NaraConfig
from nara_diffusion.cores.registry import BUILT_IN
from nara_diffusion.layers.dispatch import check_convolution, check_target, keep_out_of_float8, variant_for
from nara_diffusion.layers.initialisation import make_directions_orthonormal
from nara_diffusion.layers.variants import NaraVariant
from nara_diffusion.loaders.strict import PEFT_PREFIX, check_core_precision, check_tensors
from nara_diffusion.noise.context import active_signals
from nara_diffusion.noise.denoisers.lookup import denoiser_of
from nara_diffusion.runtime.batch_rows import rows_of
from nara_diffusion.runtime.modules import core_holders
from nara_diffusion.runtime.offloading import check_addable
from nara_diffusion.tuner.holder.core_holder import HOLDER_NAME, CoreHolder, holder_of
from nara_diffusion.tuner.holder.core_set import SHARED, core_group, core_tensors
from nara_diffusion.tuner.holder.noise_convention import check_not_static
from nara_diffusion.tuner.strength.layers import default_strengths, give_strength

from .activation import deleting, tuner_layers
from .forward_hook import attach_holder, detach_holder
from .injection import Injection, check_name_is_free, drop_idle_holder, without_holder
from .merging import MergesAtOneLevel
from .state_dict import refuse_name_in_key, with_current_names

_STATE_DICT_REMEDY = "leave state_dict out, or convert A and B alone and give the core as model.state_dict() has it"


class NaraModel(MergesAtOneLevel):
    """A model adapted with NaRA: LoRA layers whose update is s · B · C(λ) · A (arXiv 2605.29716, section 4).

    Args and attributes are those of `peft.LoraModel`; the config is a `NaraConfig`. λ comes from
    `nara_diffusion.noise_level` or a source. Where samples have a λ each, the adapted layers have to see the batch
    first, (b, …): in a model that gives them (length, b, …), all samples of a forward need the same λ.

    What of LoraModel would be wrong for an update that depends on λ is made right here (merging takes a λ) or raises
    (weighted sums, conversion of initialisations).
    """

    tuner_layer_cls = (LoraLayer, CoreHolder)  # type: ignore[assignment]

    def __init__(
        self,
        model: nn.Module,
        peft_config: Any,
        adapter_name: str,
        low_cpu_mem_usage: bool = False,
        state_dict: dict[str, Tensor] | None = None,
    ) -> None:
        if adapter_name in getattr(model, "peft_config", {}):  # where the new configuration will stand in a moment
            config = copy(peft_config[adapter_name] if isinstance(peft_config, dict) else peft_config)
            config = self._prepare_adapter_config(config, self.get_model_config(model))
            check_name_is_free(model, adapter_name, config, state_dict)  # type: ignore[arg-type]
        super().__init__(model, peft_config, adapter_name, low_cpu_mem_usage, state_dict)

    # ------------------------------------------------------------------ injection

    def inject_adapter(
        self,
        model: nn.Module,
        adapter_name: str,
        autocast_adapter_dtype: bool = True,
        low_cpu_mem_usage: bool = False,
        state_dict: dict[str, Tensor] | None = None,
    ) -> None:
        """As `peft.LoraModel.inject_adapter`; then the adapter's core is made at the root of `model`.

        If the adapters that `model` has are disabled, the new one is too, in new layers as in those that it shares.
        """
        config = self.peft_config[adapter_name]
        if not isinstance(config, NaraConfig):
            raise ValueError(f"Adapter '{adapter_name}' has a {type(config).__name__}: NaraModel needs a NaraConfig.")
        self._check_name(model, adapter_name, config)
        check_not_static(model, config, adapter_name)
        check_addable(model)
        drop_idle_holder(model)  # its source of λ was set for adapters that are gone
        holder = holder_of(model) or CoreHolder(denoiser_of(model), config.noise_convention)
        convention_stated = config.noise_convention is not None
        self.peft_config[adapter_name] = config = holder.conventions.completed(adapter_name, config)
        self._injecting = Injection(holder, config.changes_base)
        states = [layer.disable_adapters for layer in tuner_layers(model)]
        layers_only = state_dict and {key: value for key, value in state_dict.items() if HOLDER_NAME not in key}
        try:
            with without_holder(model):
                super().inject_adapter(
                    model, adapter_name, autocast_adapter_dtype, low_cpu_mem_usage, layers_only or None
                )
            # a custom core may have values that no file holds
            with torch.device("meta") if low_cpu_mem_usage and config.core_type in BUILT_IN else nullcontext():
                holder.add(adapter_name, config, self._injecting.ranks, convention_stated)
        except Exception:
            self._injecting.undo(adapter_name)
            getattr(model, "peft_config", {}).pop(adapter_name, None)
            raise
        finally:
            injected, self._injecting = self._injecting, None
        core = holder.cores[adapter_name]
        if not any(p.is_meta for p in core.parameters()):
            core.to(injected.device)
        active = self.active_adapters
        core.requires_grad_(adapter_name in active and not config.inference_mode)
        holder._active_adapter = list(active)
        for layer in (holder, *(layer for _, _, layer in injected.layers)):
            layer._disable_adapters = bool(states) and all(states)
        attach_holder(holder, model)
        give_strength(model, config, adapter_name, default_strengths(model, config, adapter_name))

    def _create_and_replace(  # type: ignore[override]
        self, lora_config: NaraConfig, adapter_name: str, target, target_name, parent, current_key, **kwargs: Any
    ) -> None:
        group = core_group(lora_config, current_key, lora_config.r)
        refuse_name_in_key(f"{PEFT_PREFIX}{current_key}.{group}", set(self.peft_config) - {adapter_name})
        check_convolution(target, current_key)
        if lora_config.reads_core:
            check_target(target, lora_config.use_dora, current_key)
        super()._create_and_replace(
            lora_config, adapter_name, target, target_name, parent, current_key=current_key, **kwargs
        )
        layer = getattr(parent, target_name)
        keep_out_of_float8(layer, adapter_name)
        injecting = self._injecting
        assert injecting is not None
        injecting.layers.append((parent, target_name, layer))
        rank = layer.r[adapter_name]  # by rank_pattern
        group = core_group(lora_config, current_key, rank)
        injecting.ranks[group] = max(rank, injecting.ranks.get(group, 0))
        if lora_config.reads_core:
            variant_class = variant_for(layer, lora_config.use_dora, current_key)
            holder = injecting.holder
            rows = rows_of(self.model, current_key)
            variant = variant_class(holder.channel, holder.core_to_merge, adapter_name, group, current_key, rows)
            layer.lora_variant[adapter_name] = variant
        if lora_config.lora_a_init == "orthogonal":
            make_directions_orthonormal(layer, adapter_name)

    def _check_name(self, model: nn.Module, adapter_name: str, config: NaraConfig) -> None:
        """Refuse names that PEFT would confuse when it saves; `_create_and_replace` looks at the names of layers."""
        others = set(self.peft_config) - {adapter_name}
        if others:
            for key in _filter_state_dict_by_key_prefixes(
                model.state_dict(), _get_tuner_state_dict_key_prefixes(model)
            ):
                refuse_name_in_key(f"{PEFT_PREFIX}{key}", {adapter_name})
            core = core_tensors(config, {SHARED: config.r})
            parts = (HOLDER_NAME, "cores", *core, "lora_A", "lora_B", "weight", "bias")
            refuse_name_in_key(".".join(parts), others)

    # ------------------------------------------------------------------ removal

    def delete_adapter(self, adapter_name: str) -> None:
        """As `peft.LoraModel.delete_adapter`; with the last adapter, the holder of the cores is removed."""
        with deleting([self.model], adapter_name):
            super().delete_adapter(adapter_name)
        drop_idle_holder(self.model)

    def _unload_and_optionally_merge(self, *args: Any, **kwargs: Any) -> nn.Module:
        has_holder = holder_of(self.model) is not None
        base: Any = super()._unload_and_optionally_merge(*args, **kwargs)  # PEFT's annotation says None
        if has_holder:
            detach_holder(self.model)
        return base

    # ------------------------------------------------------------------ refused, or right only for some adapters

    def add_weighted_adapter(self, adapters: list[str], *args: Any, **kwargs: Any) -> None:
        """PEFT's, for adapters with `core_type="identity"` alone.

        Raises:
            ValueError: one of `adapters` has a core, whose update no weighted sum of A's and B's can express.
        """
        self._refuse_cores("add_weighted_adapter", adapters)
        super().add_weighted_adapter(adapters, *args, **kwargs)

    def subtract_mutated_init(self, output_state_dict: dict[str, Tensor], adapter_name: str, kwargs: Any = None) -> Any:
        """PEFT's, for adapters with `core_type="identity"` alone; the others raise ValueError."""
        self._refuse_cores("subtract_mutated_init", [adapter_name])
        return super().subtract_mutated_init(output_state_dict, adapter_name, kwargs)

    @classmethod
    def _convert_state_dict_for_initial_model(  # type: ignore[override]
        cls, peft_model: Any, peft_config: NaraConfig, path: str, output_state_dict: dict[str, Tensor], kwargs: Any
    ) -> dict[str, Tensor]:
        if peft_config.core_type != "identity":
            raise ValueError(
                "path_initial_model_for_weight_conversion would write the difference of two static updates, which "
                "NaRA's is not: save without it, and load the adapter on the base model that it was trained on."
            )
        return super()._convert_state_dict_for_initial_model(peft_model, peft_config, path, output_state_dict, kwargs)

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        """Whether the adapter is a single LoRA here and now: λ is told by `noise_level(…)`, or it needs none.

        Then `peft.convert_to_lora` and `save_as_lora` give that LoRA (see `nara_diffusion.to_lora`).
        """
        holder = holder_of(self.model)
        if holder is not None and holder.depends_on_noise(adapter_name):
            return active_signals(holder.channel) is not None
        return all(
            isinstance(layer.lora_variant.get(adapter_name), NaraVariant)
            or layer.supports_lora_conversion(adapter_name)
            for layer in self.modules()
            if isinstance(layer, LoraLayer)
        )

    def _core_type(self, adapter_name: str) -> str:
        return getattr(self.peft_config[adapter_name], "core_type", "identity")

    def _refuse_cores(self, what: str, adapter_names: list[str]) -> None:
        for name in adapter_names:
            if name in self.peft_config and self._core_type(name) != "identity":
                raise ValueError(
                    f"{what} would ignore the core of adapter '{name}', whose update depends on λ. Activate several "
                    "adapters together instead: model.base_model.set_adapter([…])."
                )

    # ------------------------------------------------------------------ checkpoints

    @classmethod
    def _remove_adapter_name_from_key(cls, key: str, adapter_name: str) -> str:
        prefix, holder, rest = key.rpartition(f"{HOLDER_NAME}.cores.{adapter_name}.")
        if holder:
            return f"{prefix}{HOLDER_NAME}.{rest}"
        return super()._remove_adapter_name_from_key(key, adapter_name)

    @classmethod
    def _get_adapter_state_dict(
        cls,
        model: nn.Module,
        config: Any,
        adapter_name: str,
        state_dict: dict[str, Tensor],
        unwanted_adapter_names: Any,
    ) -> dict[str, Tensor]:
        selected = super()._get_adapter_state_dict(model, config, adapter_name, state_dict, unwanted_adapter_names)
        for holder in core_holders(model):
            core = holder.cores[adapter_name].state_dict() if adapter_name in holder.cores else {}
            for key, like in core.items():
                ending = f"{HOLDER_NAME}.cores.{adapter_name}.{key}"
                found = next((name for name in selected if name.endswith(ending)), None)
                if found is None:
                    raise ValueError(
                        f"'{key}' of the core of adapter '{adapter_name}' is missing from what would be saved. Is "
                        f"another adapter named like a part of it ({', '.join(unwanted_adapter_names)})? Rename that."
                    )
                check_core_precision(found, selected[found], like, "in the state_dict to be saved", _STATE_DICT_REMEDY)
        return selected

    @classmethod
    def _remap_adapter_state_dict_for_load(
        cls, model: nn.Module, config: Any, adapter_name: str, state_dict: dict[str, Tensor]
    ) -> dict[str, Tensor]:
        state_dict = with_current_names(state_dict)
        mapped = super()._remap_adapter_state_dict_for_load(model, config, adapter_name, state_dict)
        present = model.state_dict()
        prefixes = _get_tuner_state_dict_key_prefixes(model, adapter_name)
        others = [name for name in model.peft_config if name != adapter_name]  # type: ignore[union-attr]
        expected = _filter_state_dict_by_key_prefixes(present, prefixes) | cls._get_learnable_bias_state_dict(
            model, _filter_state_dict_for_adapter_name(present, others), config
        )
        for key in [key for key in mapped if key not in present and key.removeprefix(PEFT_PREFIX) in present]:
            mapped[key.removeprefix(PEFT_PREFIX)] = mapped.pop(key)
        check_tensors(mapped, expected, present)
        return mapped
