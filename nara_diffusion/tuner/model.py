"""`NaraModel`: PEFT's LoRA tuner, whose layers read C(λ) from a core at the adapted model's root."""

from __future__ import annotations

import logging
import warnings
from contextlib import nullcontext
from typing import Any

from peft.tuners.lora import LoraLayer, LoraModel
from peft.tuners.tuners_utils import (
    BaseTunerLayer,
    _filter_state_dict_by_key_prefixes,
    _get_tuner_state_dict_key_prefixes,
)
from peft.utils.save_and_load import _filter_state_dict_for_adapter_name
from torch import Tensor, nn

from nara_diffusion.config import NaraConfig
from nara_diffusion.cores.registry import (
    HOLDER_NAME,
    NAME_IN_FILES,
    core_group,
    with_current_names,
)
from nara_diffusion.layers.dispatch import (
    check_target,
    keep_out_of_float8,
    make_directions_orthonormal,
    variant_for,
)
from nara_diffusion.layers.offloading import is_dispatched_by_layers
from nara_diffusion.layers.variants import CoreChannel
from nara_diffusion.noise.denoisers import denoiser_of
from nara_diffusion.noise.level import find_holders
from nara_diffusion.noise.level import noise_level as at_noise_level
from nara_diffusion.noise.rows import row_kind_of
from nara_diffusion.strict import (
    PEFT_PREFIX,
    check_adapter_names,
    check_core_precision,
    check_keeps_configuration,
    check_tensors,
    is_core_key,
    with_names_in_files,
    without_second_biases,
)

from .holder import CoreHolder, drop_idle_holder, holder_of
from .injection import cores_for, restored_on_error, suggesting_targets, without_holder
from .merging import unmerged_on_error
from .strength import give_strength

logger = logging.getLogger(__name__)

_STATE_DICT_REMEDY = (
    "leave state_dict out, or convert A and B alone and give the core as model.state_dict() has it"
)


class NaraModel(LoraModel):
    """A model adapted with NaRA: LoRA layers whose update is s · B · C(λ) · A (arXiv 2605.29716, section 4).

    Args and attributes are those of `peft.LoraModel`; the config is a `NaraConfig`. λ comes from
    `nara_diffusion.noise_level` or a source. Where samples have a λ each, the adapted layers have to see the batch
    first, (b, …): in a model that gives them (length, b, …), all samples of a forward need the same λ.

    What of LoraModel would be wrong for an update that depends on λ is made right here (merging takes a λ) or raises
    (weighted sums, conversion of initialisations).
    """

    _injected: dict[str, LoraLayer] | None = None
    """Name → layer of the adapter that is being injected."""
    _channel: CoreChannel | None = None

    def __init__(
        self, model: nn.Module, peft_config: Any, adapter_name: str, *args: Any, **kwargs: Any
    ) -> None:
        if adapter_name in getattr(model, "peft_config", {}):
            raise ValueError(
                f"{type(model).__name__} has an adapter '{adapter_name}', which would stay beside the new one of that "
                "name: call unload() of the PeftModel that has it before, or give the new one another adapter_name."
            )
        super().__init__(model, peft_config, adapter_name, *args, **kwargs)

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
        After an error, `model` is as it was.
        """
        config = self.peft_config[adapter_name]
        if not isinstance(config, NaraConfig):
            raise ValueError(
                f"Adapter '{adapter_name}' has a {type(config).__name__}: NaraModel needs a NaraConfig."
            )
        if is_dispatched_by_layers(model) and not hasattr(model, "hf_device_map"):
            raise ValueError(
                f"{type(model).__name__} is offloaded layer by layer, so that a new adapter would have no values: load "
                "it by pipe.load_nara_weights(), or add it before enable_sequential_cpu_offload()."
            )
        layers_only = state_dict and {
            key: value for key, value in state_dict.items() if not is_core_key(key)
        }
        try:
            with restored_on_error(model):
                drop_idle_holder(model)  # its source of λ was set for adapters that are gone
                vars(model)["peft_config"] = self.peft_config  # as PEFT does afterwards
                holder = holder_of(model) or CoreHolder(model, denoiser_of(model))
                self.peft_config[adapter_name] = config = holder.finder.with_convention(
                    adapter_name, config
                )
                states = [
                    module.disable_adapters
                    for module in model.modules()
                    if isinstance(module, BaseTunerLayer)
                ]
                layers = self._injected = {}
                self._channel = holder.channel
                with without_holder(model), suggesting_targets(model, config):
                    super().inject_adapter(
                        model,
                        adapter_name,
                        autocast_adapter_dtype,
                        low_cpu_mem_usage,
                        layers_only or None,
                    )
                is_dispatched = is_dispatched_by_layers(model)
                cores = cores_for(config, adapter_name, layers, low_cpu_mem_usage, is_dispatched)
                holder.add(adapter_name, config, cores, list(layers.values()))
                holder.attach()
                check_adapter_names(model, set(self.peft_config))
                if states and all(states):
                    logger.warning(
                        "the adapters of %s are off, as disable_lora() or disable_adapters() has left them, and so is "
                        "'%s': call enable_lora() or enable_adapters() to switch them on.",
                        type(model).__name__,
                        adapter_name,
                    )
                for layer in layers.values():
                    layer._disable_adapters = bool(states) and all(states)
                holder.follow_factors()
                if config.strength is not None:
                    give_strength(model, adapter_name, config.strength)
        except BaseException:
            getattr(model, "peft_config", {}).pop(adapter_name, None)
            raise
        finally:
            self._injected = self._channel = None

    def _create_and_replace(  # type: ignore[override]
        self,
        lora_config: NaraConfig,
        adapter_name: str,
        target,
        target_name,
        parent,
        current_key,
        **kwargs: Any,
    ) -> None:
        check_target(target, lora_config, current_key)
        super()._create_and_replace(
            lora_config,
            adapter_name,
            target,
            target_name,
            parent,
            current_key=current_key,
            **kwargs,
        )
        layer = getattr(parent, target_name)
        keep_out_of_float8(layer, adapter_name)
        assert self._injected is not None
        assert self._channel is not None
        self._injected[current_key] = layer
        if lora_config.reads_core:
            variant_class = variant_for(layer, lora_config.use_dora, current_key)
            group = core_group(lora_config, current_key, layer.r[adapter_name])  # by rank_pattern
            rows = row_kind_of(self.model, current_key)
            layer.lora_variant[adapter_name] = variant_class(
                self._channel, adapter_name, group, current_key, rows
            )
        if lora_config.lora_a_init == "orthogonal":
            make_directions_orthonormal(layer, adapter_name)

    # ------------------------------------------------------------------ merging

    def merge_adapter(
        self,
        adapter_names: list[str] | None = None,
        safe_merge: bool = False,
        noise_level: float | None = None,
    ) -> None:
        """Merge the update of one λ into the base weights, until `unmerge_adapter`. All layers are merged, or none.

        Args:
            adapter_names, safe_merge: as in PEFT.
            noise_level: λ in [0, 1]. None takes λ of the active `noise_level(…)` context.

        Raises:
            ValueError: an adapter depends on λ, and λ is not known or differs between samples; or weights are
                offloaded, so that they would come back without the adapter.
        """
        holder = holder_of(self.model)
        if holder is None:  # no adapter is left: PEFT merges nothing and raises nothing
            super().merge_adapter(adapter_names, safe_merge)
            return
        names = self.active_adapters if adapter_names is None else adapter_names
        level = nullcontext() if noise_level is None else at_noise_level(self.model, noise_level)
        with level, unmerged_on_error(self.model):
            holder.level_to_merge(name for name in names if name in holder.cores)
            super().merge_adapter(adapter_names, safe_merge)

    def merge_and_unload(
        self,
        progressbar: bool = False,
        safe_merge: bool = False,
        adapter_names: list[str] | None = None,
        noise_level: float | None = None,
    ) -> nn.Module:
        """Return the base model with the update of one λ in its weights; see `merge_adapter`."""
        self.merge_adapter(adapter_names, safe_merge, noise_level=noise_level)
        with warnings.catch_warnings():  # PEFT does more than merge, and finds the layers merged
            warnings.filterwarnings("ignore", message="All adapters are already merged")
            return self._unload_and_optionally_merge(
                progressbar=progressbar, safe_merge=safe_merge, adapter_names=adapter_names
            )

    # ------------------------------------------------------------------ removal

    def delete_adapter(self, adapter_name: str) -> None:
        """As `peft.LoraModel.delete_adapter`; with the last adapter, the holder of the cores is removed."""
        super().delete_adapter(adapter_name)
        drop_idle_holder(self.model)

    def _unload_and_optionally_merge(self, *args: Any, **kwargs: Any) -> nn.Module:
        holder = holder_of(self.model)
        base: Any = super()._unload_and_optionally_merge(
            *args, **kwargs
        )  # PEFT's annotation says None
        if holder is not None:
            holder.detach()
        return base

    def _enable_peft_forward_hooks(self, *args: Any, **kwargs: Any) -> Any:
        """PEFT's; an adapter for each sample is refused, where each would need C of its own samples."""
        if kwargs.get("adapter_names") is not None and holder_of(self.model) is not None:
            raise ValueError(
                "adapter_names, an adapter for each sample, is not supported with NaRA: activate one, a batch for each."
            )
        return super()._enable_peft_forward_hooks(*args, **kwargs)

    # ------------------------------------------------------------------ refused, or right only for some adapters

    def add_weighted_adapter(self, adapters: list[str], *args: Any, **kwargs: Any) -> None:
        """PEFT's, for adapters with `core_type="identity"` alone: no weighted sum of A's and B's expresses a core."""
        for name in adapters:
            if getattr(self.peft_config.get(name), "core_type", "identity") != "identity":
                raise ValueError(
                    f"add_weighted_adapter would ignore the core of adapter '{name}', whose update depends on λ. "
                    "Activate several adapters together instead: model.base_model.set_adapter([…])."
                )
        super().add_weighted_adapter(adapters, *args, **kwargs)

    # ------------------------------------------------------------------ checkpoints

    @classmethod
    def _remove_adapter_name_from_key(cls, key: str, adapter_name: str) -> str:
        prefix, holder, rest = key.rpartition(f"{HOLDER_NAME}.cores.{adapter_name}.")
        if holder:
            return f"{prefix}{NAME_IN_FILES}.{rest}"
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
        if config.reads_core:
            check_keeps_configuration(model, adapter_name)
        selected = super()._get_adapter_state_dict(
            model, config, adapter_name, state_dict, unwanted_adapter_names
        )
        for holder in find_holders(model):
            core = holder.cores[adapter_name].state_dict() if adapter_name in holder.cores else {}
            for key, like in core.items():
                ending = f"{HOLDER_NAME}.cores.{adapter_name}.{key}"
                found = next((name for name in state_dict if name.endswith(ending)), None)
                if found is None:
                    raise ValueError(
                        f"'{key}' of the core of adapter '{adapter_name}' is missing from what would be saved: "
                        f"{_STATE_DICT_REMEDY}."
                    )
                selected[found] = state_dict[found]
                check_core_precision(
                    found,
                    selected[found],
                    like,
                    "in the state_dict to be saved",
                    _STATE_DICT_REMEDY,
                )
        return selected

    @classmethod
    def _remap_adapter_state_dict_for_load(
        cls, model: nn.Module, config: Any, adapter_name: str, state_dict: dict[str, Tensor]
    ) -> dict[str, Tensor]:
        state_dict = without_second_biases(with_current_names(state_dict), adapter_name)
        mapped = super()._remap_adapter_state_dict_for_load(model, config, adapter_name, state_dict)
        present = model.state_dict()
        core = [key for key in present if f"{HOLDER_NAME}.cores.{adapter_name}." in key]
        for key in core:
            saved = cls._remove_adapter_name_from_key(key, adapter_name)
            for name in (saved, f"{PEFT_PREFIX}{saved}"):
                if name in mapped:
                    mapped[key] = mapped.pop(name)
        prefixes = _get_tuner_state_dict_key_prefixes(model, adapter_name)
        others = [name for name in model.peft_config if name != adapter_name]  # type: ignore[union-attr]
        expected = {
            **_filter_state_dict_by_key_prefixes(present, prefixes),
            **cls._get_learnable_bias_state_dict(
                model, _filter_state_dict_for_adapter_name(present, others), config
            ),
            **{key: present[key] for key in core},
        }
        for key in [
            key for key in mapped if key not in present and key.removeprefix(PEFT_PREFIX) in present
        ]:
            mapped[key.removeprefix(PEFT_PREFIX)] = mapped.pop(key)
        check_tensors(
            *(with_names_in_files(each, adapter_name) for each in (mapped, expected, present))
        )
        return mapped
