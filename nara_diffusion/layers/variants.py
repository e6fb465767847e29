"""Define NaRA's LoRA variants, which pass D(λ) to a layer and apply it there.

    y = W0 x + b + s B (h + D h),   h = A x,   D = C − I  (paper, equation 4)

with x (b, …), A (r, d_in), D (n, r, r), B (d_out, r), on linear layers (quantised or not),
convolutions and embeddings. NaRA-DoRA's variants are in `dora`.

PEFT's own layers own A and B and call the variant's `forward`. A variant reads its D from the
model's channel and knows neither the core that computed D nor the modality. If the rank r of a
layer is lower than that of its core, the layer reads D[:r, :r].

A linear layer runs as one autograd function, `functional.linear_in_one`, unless `fits_one_function`
returns False.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Protocol, cast

import torch
import torch.nn.functional as F
from peft.tuners import lora
from peft.tuners.lora.layer import Embedding, LoraLayer, LoraVariant
from torch import Tensor, nn

from nara_diffusion.cores.core import is_autocast_enabled
from nara_diffusion.noise.level import Entry, present
from nara_diffusion.noise.parts import Parts, RowKind
from nara_diffusion.noise.rows import ModelRows, core_of_rows

from .adapted_layer import (
    CONVOLUTIONS,
    AdaptedLayer,
    base_weight,
    check_mergeable,
    delta_weight,
    factors,
)
from .functional import (
    fits_one_function,
    is_plain,
    linear_in_one,
    mixed,
    mixed_channels,
    times_core,
)
from .offloading import is_managed, onloaded

# ---------------------------------------------------------------------- D of the running forward

Key = tuple[str, str]
"""(adapter, group of layers that share a core)"""


class CoreSource(Protocol):
    """The part of the core holder's interface that the channel and the variants use."""

    def core_of_part(self, key: Key) -> tuple[Tensor, Parts | None]:
        """Return D (n, r, r) outside any forward of the root, and the parts for its rows, if any."""
        ...

    def core_to_merge(self, key: Key, layer: AdaptedLayer) -> tuple[Tensor, Tensor | None]:
        """Return D (1, r, r) for a layer that is being merged, and its λ (1,) if D depends on λ."""
        ...

    def check_merged(self, merged: Tensor) -> None:
        """Raise ValueError if the context's λ differs from the λ of merged layers."""
        ...

    def has_strength(self, name: str) -> bool:
        """Return whether the strength of an adapter depends on λ."""
        ...


@dataclass(frozen=True)
class Pushed:
    """The values of D that one forward has pushed.

    Attributes:
        present: the innermost context at the time of the push.
        entry: the innermost context for this model; None if λ came from a source.
        deviations: D (n, r, r), float32, by key.
        parts: the parts of a sample, if the rows of D belong to parts; otherwise None.
        operands: copies of D in other dtypes, made when a layer requests them.
    """

    present: Entry | None
    entry: Entry | None
    deviations: Mapping[Key, Tensor]
    parts: Parts | None = None
    operands: dict[tuple[Any, ...], Tensor] = field(default_factory=dict)


class CoreChannel:
    """Pass D(λ) from the root of an adapted model to its layers, in one thread for one forward.

    Before each forward of the root, the core holder pushes D(λ) into a `threading.local`; a forward
    hook removes it. (A compiled graph can read a `threading.local` but not a `ContextVar`, and a
    forward does not switch to another async task.)

    A layer accepts a pushed D only inside the same `noise_level(…)` as the push. If Ctrl-C ends a
    forward, the hook does not run, but the old D is still never used at another λ. (If λ came from
    a timestep, there is no context to compare. A *part* of the model that is called directly then
    reads the old D until the next forward of the whole model.)

    Args:
        holder: the core holder.
        rows: the description of how the model's layers see its batch.

    Attributes:
        local: thread-local storage with an attribute `pushed`, which is a `Pushed` or None.
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
        """Return D (1 or b, r, r), float32, for a layer, or D of parts together with the parts.

        D belongs to the current forward, or to the context around a part that is called directly.
        """
        pushed = self.pushed()
        is_current = pushed is not None and (
            torch.compiler.is_compiling() or pushed.present is present.get()
        )
        if pushed is not None and is_current:
            deviation = pushed.deviations.get(key)
            if deviation is not None:
                return deviation, pushed.parts
        return self.holder.core_of_part(key)

    def operand(self, key: Key, deviation: Tensor, like: Tensor) -> Tensor:
        """Return D in the dtype and on the device of `like`, without gradient.

        D is converted once per forward. If the adapter has a strength, D stays in float32, because
        it may be nearly −I, and after rounding, C = I + D would not be close enough to zero.
        """
        dtype, device = like.dtype, like.device
        if self.holder.has_strength(key[0]):
            dtype = torch.promote_types(dtype, torch.float32)
        if deviation.dtype == dtype and deviation.device == device:
            return deviation.detach()
        pushed = self.pushed()
        if pushed is None or pushed.deviations.get(key) is not deviation:
            return deviation.detach().to(device, dtype)
        name = (key, dtype, device, torch.is_inference_mode_enabled())
        if name not in pushed.operands:
            pushed.operands[name] = deviation.detach().to(device, dtype)
        return pushed.operands[name]

    def push(
        self, entry: Entry | None, deviations: Mapping[Key, Tensor], parts: Parts | None = None
    ) -> None:
        """Give D to the layers; `entry` is the context that set λ, or None if a source did."""
        innermost = None if torch.compiler.is_compiling() else present.get()
        self.local.pushed = Pushed(innermost, entry, deviations, parts)

    def pushed(self) -> Pushed | None:
        """Return the values that the current forward has pushed, or None outside a forward."""
        return getattr(self.local, "pushed", None)

    @contextmanager
    def using(self, deviations: Mapping[Key, Tensor], parts: Parts | None) -> Iterator[None]:
        """Give D to the layers inside the context, and restore the previous values on exit."""
        before = self.pushed()
        self.push(None if before is None else before.entry, deviations, parts)
        try:
            yield
        finally:
            self.local.pushed = before


# ---------------------------------------------------------------------- variants


class NaraVariant(LoraVariant):
    """The base class of all variants, which reads D and merges at one fixed D.

    Args:
        channel: the channel that passes D(λ) to the layer.
        adapter_name: the name of the layer's adapter.
        group: the name of the group of layers that share D.
        layer_name: the layer's name, for error messages.
        rows: the kind of rows in the layer's input.

    Attributes:
        key: (adapter_name, group), the key of D in the channel.
        merged_at: λ (1,) of the merge if D depends on λ; None otherwise, or if not merged.
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
        """Do nothing, since PEFT has made A, B and the magnitude, and the core is at the root."""

    # ------------------------------------------------------------------ forward

    def forward(
        self, module: AdaptedLayer, active_adapter: str, x: Tensor, result: Tensor, **kwargs: Any
    ) -> Tensor:
        """Return `result` plus the update for `x`. PEFT calls this method.

        A sample without a batch axis counts as a batch of one.
        """
        is_left = not getattr(module, "cast_input_dtype_enabled", True) and x.is_floating_point()
        if is_left and not is_autocast_enabled(x.device):
            # layerwise casting has turned PEFT's own conversion off
            A = module.lora_A[active_adapter]
            x = x if is_managed(A) else x.to(A.weight.dtype)
        if x.dim() < (module._kernel_dim if self.is_conv else 2):
            return self.update(module, active_adapter, x[None], result[None])[0]
        return self.update(module, active_adapter, x, result)

    def update(
        self, module: AdaptedLayer, active_adapter: str, x: Tensor, result: Tensor
    ) -> Tensor:
        """Return `result` plus the update for x (b, …)."""
        raise NotImplementedError

    def deviation(self, rank: int, x: Tensor) -> Tensor:
        """Return D (n, r, r), float32, of the current forward for the rows of `x` (b, …).

        n is 1, b, or b·k. It is b·k if λ has k values per sample; x is then seen as (b·k, l / k, …).
        """
        D, parts = self.channel.read(self.key)
        D = D if D.shape[-1] == rank else D[:, :rank, :rank]
        if parts is not None and D.shape[0] > 1:
            D, is_of_parts = parts.core_of_layer(
                D, x, kind=self.rows, is_image=self.is_conv, layer_name=self.layer_name
            )
            if is_of_parts:
                return D
        if D.shape[0] == 1 or (self.rows == "samples" and D.shape[0] == x.shape[0]):
            return D  # the result of `core_of_rows`, without the cost of a call
        return core_of_rows(
            D,
            x,
            kind=self.rows,
            sample_major=self.channel.rows.sample_major,
            layer_name=self.layer_name,
        )

    # ------------------------------------------------------------------ merging

    def merge_safe(self, module: AdaptedLayer, active_adapter: str, orig_weight: Tensor) -> Tensor:
        """Return the base weight with this adapter merged at one D."""
        check_mergeable(module, active_adapter, self.layer_name, orig_weight)
        rank = module.r[active_adapter]
        D, level = self.channel.holder.core_to_merge(self.key, module)
        A, B = factors(module, active_adapter)
        K = times_core(B, D[:, :rank, :rank])  # (1, d_out, r)
        scaling = module.scaling[active_adapter]
        factor = self.merge_factor(module, active_adapter, A, K)
        guard = module.register_forward_pre_hook(self._check_merged)
        self.merged_at = level
        module._cache_store(f"{active_adapter}-nara", (A, K, scaling, factor, guard))
        # read the weight again: DoRA's norm may have unmerged and remerged other adapters
        weight = base_weight(module.get_base_layer()).data
        merged = factor * (weight + delta_weight(module, A, K[0], scaling))
        return merged.to(orig_weight.dtype)

    def _check_merged(self, module: AdaptedLayer, args: tuple[Any, ...]) -> None:
        """Check λ before a merged layer's forward, because the root's own check may not have run."""
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
        """Return the factor for each merged row, which is 1, or m / ‖W0 + s K A‖ with DoRA.

        Args:
            K: B C (1, d_out, r).
        """
        return 1.0


class NaraLinear(NaraVariant):
    """Compute y = W0 x + b + s B C A x by adding the update to the base layer's output."""

    def update(
        self, module: AdaptedLayer, active_adapter: str, x: Tensor, result: Tensor
    ) -> Tensor:
        A, B = module.lora_A[active_adapter], module.lora_B[active_adapter]
        D, scaling = self.deviation(module.r[active_adapter], x), module.scaling[active_adapter]
        is_dropped = not is_dropout_free(module, active_adapter)
        if is_dropped:
            x = module.lora_dropout[active_adapter](x)
        if not fits_one_function(A, B, x, result):
            return torch.add(result, B(mixed(D, A(x))), alpha=scaling)
        base = None if is_dropped else frozen_base(module, result)
        operand = self.channel.operand(self.key, D, result)
        return linear_in_one(x, result, base, A.weight, D, operand, B.weight, scaling)


class NaraConv(NaraVariant):
    """Apply the same update to a convolution, with a convolution A and a pointwise B.

    The convolution may have any number of spatial axes.
    """

    is_conv = True

    def update(
        self, module: AdaptedLayer, active_adapter: str, x: Tensor, result: Tensor
    ) -> Tensor:
        A, B = module.lora_A[active_adapter], module.lora_B[active_adapter]
        D = self.deviation(module.r[active_adapter], x)
        h = A(module.lora_dropout[active_adapter](x))  # (b, r, …)
        update = B(mixed_channels(D, h))
        return torch.add(result, update, alpha=module.scaling[active_adapter])


class NaraEmbedding(NaraVariant):
    """Compute y = W0[x] + s A[:, x]ᵀ Cᵀ Bᵀ.

    PEFT looks up ids in A and then applies B, so ΔW = s (B C A)ᵀ in the weight's layout. Ids of
    shape (n,), such as the positions `arange(n)`, count as one sample.
    """

    def update(
        self, module: AdaptedLayer, active_adapter: str, x: Tensor, result: Tensor
    ) -> Tensor:
        D = self.deviation(module.r[active_adapter], x)
        with onloaded(module.lora_embedding_A, module.lora_embedding_B):
            h = module._embed(x, module.lora_embedding_A[active_adapter].T)  # (b, l, r)
            embed_scale = module._get_embed_scale()
            if embed_scale is not None:
                h = h * embed_scale.to(h.dtype)
            update = F.linear(mixed(D, h), module.lora_embedding_B[active_adapter])
            return torch.add(result, update, alpha=module.scaling[active_adapter])


def is_dropout_free(layer: AdaptedLayer, adapter_name: str) -> bool:
    """Return whether the forward of an adapter applies no dropout."""
    return isinstance(layer.lora_dropout[adapter_name], nn.Identity) or not layer.training


def frozen_base(layer: AdaptedLayer, result: Tensor) -> tuple[Tensor, Tensor | None] | None:
    """Return W0 and b if `linear_in_one` may compute the gradient that reaches x through W0.

    Return None if the base layer is trained, quantised or hooked, if another tuner wraps it, or if
    several adapters are active.
    """
    base = layer._modules["base_layer"]
    if not isinstance(base, nn.Linear) or not is_plain(base) or len(layer.active_adapters) != 1:
        return None
    if not result.is_contiguous():
        return None
    bias = base.bias
    if base.weight.requires_grad or (bias is not None and bias.requires_grad):
        return None
    return base.weight, bias


# ---------------------------------------------------------------------- which layer has which variant

_FORWARDS = (lora.Linear.forward, Embedding.forward, lora.Conv2d.forward)
"""The forwards of PEFT's layers that call LoRA variants."""
_QUANTISED = ("Linear8bitLt", "Linear4bit", "GPTQLoraLinear", "HqqLoraLinear")
"""Names of further layers that call LoRA variants; their libraries may be missing."""


def check_target(target: nn.Module, reads_core: bool, name: str) -> None:
    """Raise an error for a module that NaRA cannot adapt, before PEFT adapts it.

    Args:
        reads_core: whether the update depends on a core.
        name: the module's name, for error messages.

    Raises:
        ValueError: no LoRA variant supports the module, or PEFT's layer would not compute the
            update in the same way as the module computes W0 x (the convolution A in PEFT ignores
            dilation and padding mode).
    """
    base = target.get_base_layer() if isinstance(target, LoraLayer) else target
    if isinstance(base, nn.modules.conv._ConvNd):
        _check_convolution(base, name)
    if reads_core and isinstance(base, nn.MultiheadAttention):
        raise ValueError(
            f"NaRA cannot adapt '{name}' (MultiheadAttention): PEFT merges its update before each "
            'forward, without λ. Leave it out with `exclude_modules`, or use core_type="identity".'
        )


def _check_convolution(base: nn.modules.conv._ConvNd, name: str) -> None:
    if base.padding_mode != "zeros":
        option = f"padding_mode={base.padding_mode!r}"
    elif any(step != 1 for step in base.dilation):
        option = f"dilation={base.dilation}"
    else:
        return
    raise ValueError(
        f"NaRA cannot adapt '{name}' ({type(base).__name__} with {option}): PEFT's convolution A "
        "has dilation 1 and pads with zeros, so the forward would not be that of W0 + s·B·C·A. "
        "Leave it out with `exclude_modules`."
    )


def variant_for(layer: LoraLayer, name: str) -> type[NaraVariant]:
    """Return the LoRA variant for a PEFT layer, without DoRA (`dora.with_norm` adds that).

    Raises:
        ValueError: PEFT's class for the layer does not call LoRA variants.
    """
    kind: type[Any] = type(layer)
    if kind.forward not in _FORWARDS and kind.__name__ not in _QUANTISED:
        raise ValueError(
            f"NaRA cannot adapt '{name}' ({type(layer.get_base_layer()).__name__}, adapted by "
            f"PEFT's {kind.__name__}): that class skips λ-dependent updates. Leave it out with "
            '`exclude_modules`, or use core_type="identity".'
        )
    if isinstance(layer, Embedding):
        return NaraEmbedding
    if isinstance(layer, CONVOLUTIONS):
        return NaraConv
    return NaraLinear


# ---------------------------------------------------------------------- states of PEFT's layers


class _OutsideAutocast:
    """A flag for PEFT's `cast_input_dtype_enabled` that is true unless autocast is on.

    PEFT converts a layer's input to the dtype of A. Under autocast, the product with A converts it
    back. This would cost two kernels per layer, and two more in backward.
    """

    def __bool__(self) -> bool:
        return not torch._C._is_any_autocast_enabled()


OUTSIDE_AUTOCAST = _OutsideAutocast()


def keep_out_of_float8(layer: LoraLayer, adapter_name: str) -> None:
    """Convert A and B to float32 if PEFT made them float8.

    PEFT makes them float8 if the base weight is under layerwise casting.
    """
    for attribute in layer.adapter_layer_names:
        factors = cast(nn.Module, getattr(layer, attribute))
        for name, parameter in factors.named_parameters():
            if name.split(".")[0] == adapter_name and is_float8(parameter.dtype):
                parameter.data = parameter.data.float()


def is_float8(dtype: torch.dtype) -> bool:
    """Return whether `dtype` is an 8-bit float, a possible storage dtype of layerwise casting."""
    return dtype.is_floating_point and dtype.itemsize == 1
