"""Extend PEFT's LoRA tuner with layers that read C(λ) from a core at the model's root.

    y = W0 x + s · B · C(λ) · A x        C(λ) of the layer's group, computed by the root's holder

To add an adapter, the tuner checks it, injects its layers and makes its cores. After an error, the
model is unchanged.
"""

from __future__ import annotations

import logging
import warnings
from contextlib import AbstractContextManager, nullcontext
from typing import Any

from peft.tuners.lora import LoraLayer, LoraModel
from torch import Tensor, nn

from nara_diffusion.config import NaraConfig
from nara_diffusion.cores.core_set import core_group, is_core_key, with_current_names
from nara_diffusion.layers.adapted_layer import make_directions_orthonormal
from nara_diffusion.layers.channel import CoreChannel
from nara_diffusion.layers.offloading import is_float8
from nara_diffusion.layers.residual import start_from_singular_vectors
from nara_diffusion.layers.targets import (
    check_norm,
    check_target,
    variant_for,
)
from nara_diffusion.layers.variants import OUTSIDE_AUTOCAST
from nara_diffusion.noise.context import noise_level as at_noise_level
from nara_diffusion.noise.rows import row_kind_of
from nara_diffusion.strict import check_keeps_configuration, check_tensors

from .adding import (
    adapters_are_off,
    checked_config,
    cores_for,
    is_dispatched_by_layers,
    restored_on_error,
    without_holder,
)
from .holder import CoreHolder, drop_idle_holder, holder_of
from .merging import unmerged_on_error
from .strength import give_strength
from .tensor_names import (
    check_adapter_names,
    core_name_in_file,
    core_tensors,
    expected_tensors,
    with_model_names,
    with_names_in_files,
    without_adapters,
    without_second_biases,
)
from .twins import decoder_name, share_factors, with_twins, without_twins

logger = logging.getLogger(__name__)


class NaraModel(LoraModel):
    """A model with LoRA layers that compute the update s · B · C(λ) · A of NaRA.

    See section 4 of arXiv 2605.29716. Arguments and attributes are those of `peft.LoraModel`; the
    configuration is a `NaraConfig`. λ comes from `nara_diffusion.noise_level` or a source. Samples
    can have different λ only if the adapted layers get the batch axis first, (b, …). If the layers
    get (length, b, …), all samples of a forward need the same λ.

    Some methods of LoraModel would be wrong for an update that depends on λ. Here, merging takes a
    λ, while weighted sums and conversion of initialisations raise an error.
    """

    _injected: dict[str, LoraLayer] | None = None
    """Name → layer of the adapter that is being injected."""
    _channel: CoreChannel | None = None
    """The channel of the holder that the adapter's cores are added to."""

    def __init__(
        self, model: nn.Module, peft_config: Any, adapter_name: str, *args: Any, **kwargs: Any
    ) -> None:
        if adapter_name in getattr(model, "peft_config", {}):
            raise ValueError(
                f"{type(model).__name__} already has an adapter '{adapter_name}' from another PeftModel. Call unload() "
                "of that PeftModel first, or pass another adapter_name."
            )
        super().__init__(model, peft_config, adapter_name, *args, **kwargs)

    def inject_adapter(
        self,
        model: nn.Module,
        adapter_name: str,
        autocast_adapter_dtype: bool = True,
        low_cpu_mem_usage: bool = False,
        state_dict: dict[str, Tensor] | None = None,
    ) -> None:
        """Inject the adapter as `peft.LoraModel` does, then make its cores at the root of `model`.

        If the existing adapters of `model` are disabled, the new adapter is disabled in all its
        layers, too. After an error, `model` is unchanged.
        """
        config = checked_config(model, adapter_name, self.peft_config[adapter_name])
        layers_only = {
            key: value for key, value in (state_dict or {}).items() if not is_core_key(key)
        }
        try:
            with restored_on_error(model):
                drop_idle_holder(model)  # its source of λ belongs to adapters that are gone
                vars(model)["peft_config"] = self.peft_config  # PEFT also does this, but later
                holder = holder_of(model) or CoreHolder(model)
                config = holder.finder.with_convention(adapter_name, config)
                self.peft_config[adapter_name] = config
                are_off = adapters_are_off(model)
                layers = self._injected = {}
                self._channel = holder.channel
                with without_holder(model):
                    super().inject_adapter(
                        model,
                        adapter_name,
                        autocast_adapter_dtype,
                        low_cpu_mem_usage,
                        layers_only or None,
                    )
                holder.finder.forwards.check_layers(layers)
                shared = share_factors(model, adapter_name, layers)
                owners = {name: layer for name, layer in layers.items() if name not in shared}
                cores = cores_for(
                    config, adapter_name, owners, low_cpu_mem_usage, is_dispatched_by_layers(model)
                )
                holder.add(adapter_name, config, cores, list(layers.values()))
                holder.attach()
                if len(self.peft_config) > 1:
                    check_adapter_names(model, set(self.peft_config))
                if are_off:
                    logger.warning(
                        "The adapters of %s are disabled (disable_lora() or disable_adapters()), and so is the new "
                        "adapter '%s': call enable_lora() or enable_adapters() to enable them.",
                        type(model).__name__,
                        adapter_name,
                    )
                for layer in layers.values():
                    layer._disable_adapters = are_off
                holder.follow_factors()
                if config.strength is not None:
                    give_strength(model, adapter_name, config.strength)
        except BaseException:
            getattr(model, "peft_config", {}).pop(adapter_name, None)
            raise
        finally:
            self._injected = self._channel = None

    def _create_and_replace(
        self, lora_config, adapter_name: str, target, target_name: str, parent, **kwargs: Any
    ) -> None:
        current_key: str = kwargs["current_key"]
        check_target(target, lora_config.reads_core, current_key, lora_config.core_type)
        has_norm = lora_config.reads_core and lora_config.use_dora
        if has_norm:
            check_norm(target, current_key)
        super()._create_and_replace(
            lora_config, adapter_name, target, target_name, parent, **kwargs
        )
        layer = getattr(parent, target_name)
        for name, parameter in layer.named_parameters():
            is_new = name.startswith("lora_") and name.split(".")[1] == adapter_name
            if is_new and is_float8(parameter.dtype):  # the base is under layerwise casting
                parameter.data = parameter.data.float()
        assert self._injected is not None
        assert self._channel is not None
        self._injected[current_key] = layer
        if lora_config.reads_core:
            variant_class = variant_for(
                layer, current_key, has_norm, has_residual=lora_config.has_residual
            )
            owner = decoder_name(self.model, current_key) or current_key
            group = core_group(lora_config, owner, layer.r[adapter_name])  # by rank_pattern
            rows = row_kind_of(self.model, current_key)
            layer.lora_variant[adapter_name] = variant_class(
                self._channel, adapter_name, group, current_key, rows
            )
            layer.cast_input_dtype_enabled = OUTSIDE_AUTOCAST
        if lora_config.lora_a_init == "orthogonal":
            make_directions_orthonormal(layer, adapter_name)
        elif lora_config.has_residual and not lora_config.inference_mode:
            start_from_singular_vectors(
                layer, adapter_name, of_base=lora_config.lora_a_init == "residual_base"
            )

    def merge_adapter(
        self,
        adapter_names: list[str] | None = None,
        safe_merge: bool = False,
        noise_level: float | None = None,
    ) -> None:
        """Merge the update at one λ into the base weights, until `unmerge_adapter`.

        Either all layers are merged, or none.

        Args:
            adapter_names: as in PEFT.
            safe_merge: as in PEFT.
            noise_level: λ in [0, 1]. None means the λ of the active `noise_level(…)` context.

        Raises:
            ValueError: an adapter depends on λ, but λ is unknown or differs between samples; or
                weights are offloaded, so they would be reloaded without the adapter.
        """
        holder = holder_of(self.model)
        if holder is None:  # no adapter is left: PEFT merges nothing and raises nothing
            super().merge_adapter(adapter_names, safe_merge)
            return
        names = self.active_adapters if adapter_names is None else adapter_names
        level = nullcontext() if noise_level is None else at_noise_level(self.model, noise_level)
        with level, unmerged_on_error(self.model):
            holder.merging.level_to_merge(names, holder.context())
            super().merge_adapter(adapter_names, safe_merge)

    def merge_and_unload(
        self,
        progressbar: bool = False,
        safe_merge: bool = False,
        adapter_names: list[str] | None = None,
        noise_level: float | None = None,
    ) -> nn.Module:
        """Return the base model with the update at one λ merged into it; see `merge_adapter`."""
        self.merge_adapter(adapter_names, safe_merge, noise_level=noise_level)
        with warnings.catch_warnings():  # PEFT warns that layers are already merged
            warnings.filterwarnings("ignore", message="All adapters are already merged")
            return self._unload_and_optionally_merge(
                progressbar=progressbar, safe_merge=safe_merge, adapter_names=adapter_names
            )

    def delete_adapter(self, adapter_name: str) -> None:
        """Delete the adapter as `peft.LoraModel` does, and remove the holder after the last one."""
        super().delete_adapter(adapter_name)
        drop_idle_holder(self.model)

    def _unload_and_optionally_merge(self, *args: Any, **kwargs: Any) -> nn.Module:
        holder = holder_of(self.model)
        base: Any = super()._unload_and_optionally_merge(*args, **kwargs)  # PEFT annotates None
        if holder is not None:
            holder.detach()
        return base

    def _enable_peft_forward_hooks(self, *args: Any, **kwargs: Any) -> AbstractContextManager[None]:
        """Raise an error for one adapter per sample, since each would need its own samples' C."""
        if kwargs.get("adapter_names") is not None and holder_of(self.model) is not None:
            raise ValueError(
                "adapter_names, an adapter for each sample, is not supported with NaRA: run one batch per adapter."
            )
        return super()._enable_peft_forward_hooks(*args, **kwargs)

    def add_weighted_adapter(self, adapters: list[str], *args: Any, **kwargs: Any) -> None:
        """Raise an error for adapters with a core, which no weighted sum of A and B can give.

        Adapters with `core_type="identity"` are allowed.
        """
        for name in adapters:
            if getattr(self.peft_config.get(name), "core_type", "identity") != "identity":
                raise ValueError(
                    f"add_weighted_adapter would ignore the core of adapter '{name}', so its update would be wrong. "
                    "Activate several adapters together instead: model.base_model.set_adapter([…])."
                )
        super().add_weighted_adapter(adapters, *args, **kwargs)

    @classmethod
    def _remove_adapter_name_from_key(cls, key: str, adapter_name: str) -> str:
        core = core_name_in_file(key, adapter_name)
        return core or super()._remove_adapter_name_from_key(key, adapter_name)

    @classmethod
    def _get_adapter_state_dict(
        cls,
        model: nn.Module,
        config: NaraConfig,
        adapter_name: str,
        state_dict: dict[str, Tensor],
        unwanted_adapter_names: list[str],
    ) -> dict[str, Tensor]:
        if config.reads_core:
            check_keeps_configuration(model, adapter_name)
        selected = super()._get_adapter_state_dict(
            model, config, adapter_name, state_dict, unwanted_adapter_names
        )
        return without_twins(model, selected) | core_tensors(state_dict, model, adapter_name)

    @classmethod
    def _remap_adapter_state_dict_for_load(
        cls,
        model: nn.Module,
        config: NaraConfig,
        adapter_name: str,
        state_dict: dict[str, Tensor],
    ) -> dict[str, Tensor]:
        tensors = without_second_biases(with_current_names(state_dict), adapter_name)
        mapped = super()._remap_adapter_state_dict_for_load(model, config, adapter_name, tensors)
        present = model.state_dict()
        mapped = with_model_names(mapped, present, adapter_name)
        peft_config: Any = model.peft_config
        of_adapter = without_adapters(present, set(peft_config) - {adapter_name})
        selected = super()._get_adapter_state_dict(model, config, adapter_name, of_adapter, [])
        expected = expected_tensors(model, without_twins(model, selected), adapter_name)
        check_tensors(
            with_names_in_files(mapped, adapter_name),
            with_names_in_files(expected, adapter_name),
            with_names_in_files(present, adapter_name),
        )
        return with_twins(model, mapped, present)
