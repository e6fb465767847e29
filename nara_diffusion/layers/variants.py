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

from typing import Any

import torch
import torch.autograd.forward_ad as forward_ad
import torch.nn.functional as F
from peft.tuners.lora.layer import LoraVariant
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.nn.modules.module import _has_any_global_hook

from nara_diffusion.cores.core import is_autocast_enabled
from nara_diffusion.noise.parts import RowKind
from nara_diffusion.noise.rows import core_of_rows

from .adapted_layer import (
    AdaptedLayer,
    base_weight,
    check_mergeable,
    delta_weight,
    factors,
)
from .channel import CoreChannel
from .functional import (
    linear_in_one,
    mixed,
    mixed_channels,
    times_core,
)
from .offloading import is_managed, onloaded

_TENSORS = (Tensor, FakeTensor)


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

        The core "film" has a further column, (n, r, r + 1), and its layers all have its rank.
        n is 1, b, or b·k. It is b·k if λ has k values per sample; x is then seen as (b·k, l / k, …).
        """
        D, parts = self.channel.read(self.key)
        D = D if D.shape[-2] == rank else D[:, :rank, :rank]
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
            sample_major=self.channel.rows.source.sample_major,
            tiled=self.channel.rows.source.tiled,
            layer_name=self.layer_name,
        )

    def rise(self, D: Tensor, A: nn.Linear, B: nn.Linear, x: Tensor) -> Tensor:
        """Return B C A x (b, …, d_out), or (b, d_out, …) of a convolution.

        If D has a further column, the β of the core "film", return B (C A x + β).
        """
        h = A(x)
        return B(mixed_channels(D, h) if self.is_conv else mixed(D, h))

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
        is_dropped = not is_dropout_free(module, active_adapter)
        is_fused = fits_one_function(A, B, x, result)
        base = frozen_base(module, result) if is_fused and not is_dropped else None
        D, scaling = self.deviation(module.r[active_adapter], x), module.scaling[active_adapter]
        if is_dropped:
            x = module.lora_dropout[active_adapter](x)
        if not is_fused or D.shape[-1] > D.shape[-2]:  # film's β is not in the one function
            return torch.add(result, self.rise(D, A, B, x), alpha=scaling)
        operand = self.channel.operand(self.key, D, result)
        return linear_in_one(x, result, base, A.weight, D, operand, B.weight, scaling)


class NaraConv(NaraLinear):
    """Apply the same update to a convolution, with a convolution A and a pointwise B.

    The convolution may have any number of spatial axes.
    """

    is_conv = True


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


class OutsideAutocast:
    """A flag for PEFT's `cast_input_dtype_enabled` that is true unless autocast is on.

    PEFT converts a layer's input to the dtype of A. Under autocast, the product with A converts it
    back. This would cost two kernels per layer, and two more in backward.
    """

    def __bool__(self) -> bool:
        return not torch._C._is_any_autocast_enabled()


OUTSIDE_AUTOCAST = OutsideAutocast()


def is_dropout_free(layer: AdaptedLayer, adapter_name: str) -> bool:
    """Return whether the forward of an adapter applies no dropout."""
    return not layer.training or isinstance(layer.lora_dropout[adapter_name], nn.Identity)


def frozen_base(layer: AdaptedLayer, result: Tensor) -> tuple[Tensor, Tensor | None] | None:
    """Return W0 and b if `linear_in_one` may compute the gradient that reaches x through W0.

    Return None if the base layer is trained, quantised or hooked, if another tuner wraps it, or if
    several adapters are active.
    """
    base = layer._modules["base_layer"]
    if (
        not isinstance(base, nn.Linear)
        or not is_plain(base)
        or len(layer.active_adapters) != 1
        or not result.is_contiguous()
    ):
        return None
    bias = base.bias
    if base.weight.requires_grad or (bias is not None and bias.requires_grad):
        return None
    return base.weight, bias


def fits_one_function(A: nn.Linear, B: nn.Linear, x: Tensor, result: Tensor) -> bool:
    """Return whether `linear_in_one` may add the update of `x` to `result`.

    If not, the layer is computed step by step. This is the case under a compiler, which fuses the
    steps itself, and for `vmap`, `jvp` and TorchScript. It is also the case if A or B has hooks,
    wrappers (offloading, pruning) or a bias, or if dtypes differ outside autocast. The last case is
    tensor subclasses, except fake tensors: `--plan` uses these to measure the real computation.
    """
    if (
        torch.compiler.is_compiling()
        or torch.jit.is_tracing()  # type: ignore[reportPrivateImportUsage]
        or torch._C._are_functorch_transforms_active()
        or forward_ad._current_level >= 0
        or _has_any_global_hook()
    ):
        return False
    if not (is_plain(A) and is_plain(B)) or B.bias is not None:
        return False
    if type(x) not in _TENSORS or type(result) not in _TENSORS:
        return False
    if x.device.type != "meta" and torch.is_autocast_enabled(x.device.type):
        return result.dtype == torch.get_autocast_dtype(x.device.type)
    return A.weight.dtype == B.weight.dtype == x.dtype == result.dtype


def is_plain(layer: nn.Module) -> bool:
    """Return whether `layer` is an `nn.Linear` that no hook or wrapper changes."""
    attributes = vars(layer)
    return (
        type(layer) is nn.Linear
        and "forward" not in attributes
        and type(attributes["_parameters"].get("weight")) in (nn.Parameter, FakeTensor)
        and not (attributes["_forward_hooks"] or attributes["_forward_pre_hooks"])
        and not (attributes["_backward_hooks"] or attributes["_backward_pre_hooks"])
    )
