"""NaRA's LoRA variants on linear layers (quantised or not), convolutions and embeddings.

    y = W0 x + b + s B C A x                              (paper, equation 4)

with x (b, …), A (r, d_in), C (b, r, r) or (1, r, r), B (d_out, r). NaRA-DoRA's are in `dora`.

PEFT's own layers own A and B and call the variant's `forward`. A variant reads its C from the
model's channel; it knows neither the core that made C nor the modality. If the rank r of a layer is
below that of its core, the layer reads C[:r, :r].
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from peft.tuners.lora.layer import LoraVariant
from torch import Tensor, nn

from nara_diffusion.noise.level import Entry, present
from nara_diffusion.noise.parts import Parts, RowKind
from nara_diffusion.noise.rows import ModelRows, core_of_rows

from . import one_function
from .adapted_layer import AdaptedLayer, base_weight, check_mergeable, delta_weight, factors
from .functional import apply_core, apply_core_to_channels, times_core
from .offloading import is_managed, onloaded
from .one_function import linear_in_one, runs_in_one

Key = tuple[str, str]
"""(adapter, group of layers that share a core)"""
Pushed = tuple[Entry | None, Entry | None, Mapping[Key, Tensor], Parts | None]
"""What one forward gives its layers; see `CoreChannel`."""


class CoreSource(Protocol):
    """What the channel and the variants need from the holder of the cores."""

    def core_of_part(self, key: Key) -> tuple[Tensor, Parts | None]:
        """Return C (n, r, r), and the parts of its rows, outside any forward of the root."""
        ...

    def core_to_merge(self, key: Key, layer: AdaptedLayer) -> tuple[Tensor, Tensor | None]:
        """Return C (1, r, r) for a layer that is being merged, and its λ (1,) if C depends on λ."""
        ...

    def check_merged(self, merged: Tensor) -> None:
        """Raise ValueError if λ of the context is not λ of merged layers."""
        ...


class CoreChannel:
    """Pass C(λ) from the root of an adapted model to its layers, in one thread for one forward.

    Before each forward of the root, the holder of the cores pushes C(λ) into a `threading.local`; a
    forward hook removes it. (A compiled graph can read a `threading.local` but not a `ContextVar`,
    and a forward does not switch to another async task.)

    A layer accepts a pushed C only inside the same `noise_level(…)` as the push. No hook runs after
    a forward that Ctrl-C has ended, but its C is not used at another λ. (If λ came from a timestep,
    there is no context to compare. After Ctrl-C, a *part* of the model that is called by itself
    then reads the old C, until the next forward of the whole model.)

    Args:
        holder: the holder of the cores.
        rows: how the model's layers see its batch.

    Attributes:
        local: its attribute `pushed` is (present, entry, cores, parts): the innermost context at
            the push, the innermost context for this model, key → C, and the parts of a sample that
            the rows of C belong to, if they do.
    """

    def __init__(self, holder: CoreSource, rows: ModelRows) -> None:
        self.holder = holder
        self.rows = rows
        self.local = threading.local()

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "local"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, local=threading.local())

    def read(self, key: Key) -> tuple[Tensor, Parts | None]:
        """Return C (1 or b, r, r), float32, or C of parts and these parts, for a layer.

        It is C of the running forward, or of the context around a part that is called by itself.
        """
        pushed = getattr(self.local, "pushed", None)
        if pushed is not None and (torch.compiler.is_compiling() or pushed[0] is present.get()):
            core = pushed[2].get(key)
            if core is not None:
                return core, pushed[3]
        return self.holder.core_of_part(key)

    def push(
        self, entry: Entry | None, cores: Mapping[Key, Tensor], parts: Parts | None = None
    ) -> None:
        """Give `cores` to the layers. `entry` is the context that gave λ; None for a source."""
        innermost = None if torch.compiler.is_compiling() else present.get()
        self.local.pushed = (innermost, entry, cores, parts)

    def pushed(self) -> Pushed | None:
        """Return what the running forward has pushed; None if none runs."""
        return getattr(self.local, "pushed", None)

    @contextmanager
    def using(self, cores: Mapping[Key, Tensor], parts: Parts | None) -> Iterator[None]:
        """Give `cores` to the layers inside the context, and the previous ones afterwards."""
        before = self.pushed()
        self.push(None if before is None else before[1], cores, parts)
        try:
            yield
        finally:
            self.local.pushed = before


class NaraVariant(LoraVariant):
    """The base of all variants: reading C, and merging at one fixed C.

    Args:
        channel: passes C(λ) to the layer.
        adapter_name: the layer's adapter.
        group: the group of layers that share its C.
        layer_name: for error messages.
        rows: what the rows of the layer's input are.

    Attributes:
        key: (adapter_name, group), the key of C in the channel.
        merged_at: λ (1,) of the merged layer, if C depends on λ; otherwise None.
    """

    is_conv = False

    def __init__(
        self,
        channel: CoreChannel,
        adapter_name: str,
        group: str,
        layer_name: str,
        rows: RowKind = "samples",
    ) -> None:
        self.channel = channel
        self.key = (adapter_name, group)
        self.layer_name = layer_name
        self.rows: RowKind = rows
        self.merged_at: Tensor | None = None

    def supports_lora_conversion(self) -> bool:
        return False

    def init(self, module: AdaptedLayer, adapter_name: str, **kwargs: Any) -> None:
        """Do nothing: PEFT has made A, B and the magnitude, and the core belongs to the root."""

    # ------------------------------------------------------------------ forward

    def forward(
        self, module: AdaptedLayer, active_adapter: str, x: Tensor, result: Tensor, **kwargs: Any
    ) -> Tensor:
        """Return `result` plus the update of `x`. PEFT calls this method.

        A sample without a batch axis counts as a batch of one.
        """
        if not getattr(module, "cast_input_dtype_enabled", True) and x.is_floating_point():
            # layerwise casting has turned PEFT's own conversion off
            A = module.lora_A[active_adapter]
            x = x if is_managed(A) else x.to(A.weight.dtype)
        if x.dim() < (module._kernel_dim if self.is_conv else 2):
            return self.update(module, active_adapter, x[None], result[None])[0]
        return self.update(module, active_adapter, x, result)

    def update(
        self, module: AdaptedLayer, active_adapter: str, x: Tensor, result: Tensor
    ) -> Tensor:
        """Do what `forward` does, for x (b, …)."""
        raise NotImplementedError

    def batch_core(self, rank: int, x: Tensor) -> Tensor:
        """Return C of the running forward for the rows of `x` (b, …): (b or 1, r, r), float32.

        If λ has k values for each sample, the result is (b·k, r, r), for x seen as (b·k, l / k, …).
        """
        core, parts = self.channel.read(self.key)
        core = core if core.shape[-1] == rank else core[:, :rank, :rank]
        if parts is not None and core.shape[0] > 1:
            core, is_of_parts = parts.core_of_layer(
                core, x, kind=self.rows, is_image=self.is_conv, layer_name=self.layer_name
            )
            if is_of_parts:
                return core
        if core.shape[0] == 1 or (self.rows == "samples" and core.shape[0] == x.shape[0]):
            return core  # the result of `core_of_rows`, without the cost of a call
        return core_of_rows(
            core,
            x,
            kind=self.rows,
            sample_major=self.channel.rows.sample_major,
            layer_name=self.layer_name,
        )

    # ------------------------------------------------------------------ merging

    def merge_safe(self, module: AdaptedLayer, active_adapter: str, orig_weight: Tensor) -> Tensor:
        """Return the base weight with this adapter merged at one C."""
        check_mergeable(module, active_adapter, self.layer_name, orig_weight)
        rank = module.r[active_adapter]
        core, level = self.channel.holder.core_to_merge(self.key, module)
        A, B = factors(module, active_adapter)
        K = times_core(B, core[:, :rank, :rank])  # (1, d_out, r)
        scaling = module.scaling[active_adapter]
        factor = self.merge_factor(module, active_adapter, A, K)
        guard = module.register_forward_pre_hook(self._check_merged)
        self.merged_at = level
        module._cache_store(f"{active_adapter}-nara", (A, K, scaling, factor, guard))
        # read it again: DoRA's norm may have unmerged other adapters and merged them again
        weight = base_weight(module.get_base_layer()).data
        merged = factor * (weight + delta_weight(module, A, K[0], scaling))
        return merged.to(orig_weight.dtype)

    def _check_merged(self, module: AdaptedLayer, args: tuple[Any, ...]) -> None:
        """Check λ before the forward of a merged layer, since the root may not run and check it."""
        if module.merged and not module.disable_adapters and self.merged_at is not None:
            self.channel.holder.check_merged(self.merged_at)

    def merge_unsafe(self, module: AdaptedLayer, active_adapter: str, orig_weight: Tensor) -> None:
        orig_weight.data = self.merge_safe(module, active_adapter, orig_weight)

    def unmerge(self, module: AdaptedLayer, active_adapter: str, orig_weight: Tensor) -> Tensor:
        check_mergeable(module, active_adapter, self.layer_name, orig_weight)
        A, K, scaling, factor, guard = module._cache_pop(f"{active_adapter}-nara")
        guard.remove()
        self.merged_at = None
        weight = orig_weight.data / factor - delta_weight(module, A, K[0], scaling)
        return weight.to(orig_weight.dtype)

    def merge_factor(
        self, module: AdaptedLayer, active_adapter: str, A: Tensor, K: Tensor
    ) -> Tensor | float:
        """Return the factor of each merged row: 1, or DoRA's m / ‖W0 + s K A‖.

        Args:
            K: B C (1, d_out, r).
        """
        return 1.0


class NaraLinear(NaraVariant):
    """y = W0 x + b + s B C A x; the update is added to the base layer's output."""

    def update(
        self, module: AdaptedLayer, active_adapter: str, x: Tensor, result: Tensor
    ) -> Tensor:
        A, B = module.lora_A[active_adapter], module.lora_B[active_adapter]
        core, scaling = self.batch_core(module.r[active_adapter], x), module.scaling[active_adapter]
        is_large = result.numel() >= one_function.MIN_ELEMENTS
        if is_large and is_dropout_free(module, active_adapter):
            base_layer = module.get_base_layer()
            if runs_in_one(module, base_layer, A, B, x, result):
                return linear_in_one(x, result, base_layer, A.weight, core, B.weight, scaling)
        h = A(module.lora_dropout[active_adapter](x))  # (b, …, r)
        return torch.add(result, B(apply_core(core, h)), alpha=scaling)


class NaraConv(NaraVariant):
    """The same update on a convolution: A is a convolution, and B has kernel 1.

    The number of spatial axes is arbitrary.
    """

    is_conv = True

    def update(
        self, module: AdaptedLayer, active_adapter: str, x: Tensor, result: Tensor
    ) -> Tensor:
        A, B = module.lora_A[active_adapter], module.lora_B[active_adapter]
        core = self.batch_core(module.r[active_adapter], x)
        h = A(module.lora_dropout[active_adapter](x))  # (b, r, …)
        update = B(apply_core_to_channels(core, h))
        return torch.add(result, update, alpha=module.scaling[active_adapter])


class NaraEmbedding(NaraVariant):
    """y = W0[x] + s A[:, x] Cᵀ Bᵀ.

    PEFT looks ids up in A and then applies B, so ΔW = s (B C A)ᵀ in the weight's layout. Ids (n,),
    such as the positions `arange(n)`, are one sample.
    """

    def update(
        self, module: AdaptedLayer, active_adapter: str, x: Tensor, result: Tensor
    ) -> Tensor:
        core = self.batch_core(module.r[active_adapter], x)
        with onloaded(module.lora_embedding_A, module.lora_embedding_B):
            h = module._embed(x, module.lora_embedding_A[active_adapter].T)  # (b, l, r)
            embed_scale = module._get_embed_scale()
            if embed_scale is not None:
                h = h * embed_scale.to(h.dtype)
            update = F.linear(apply_core(core, h), module.lora_embedding_B[active_adapter])
            return torch.add(result, update, alpha=module.scaling[active_adapter])


def is_dropout_free(layer: AdaptedLayer, adapter_name: str) -> bool:
    """Return whether the forward of an adapter applies no dropout."""
    return isinstance(layer.lora_dropout[adapter_name], nn.Identity) or not layer.training
