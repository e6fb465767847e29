"""The gradient of each sample's loss at B of a static LoRA, summed over bins of λ and two halves of their samples.

    y = W x + s B A x,   z = A x (l, r),   δ = ∂ loss_i / ∂ (B z) (l, d_out):   g_i = ∂ loss_i / ∂ B = δᵀ z  (d_out, r)

At B's start, zero, the gradient at A vanishes, and g_i = s G_i Aᵀ with G_i (d_out, d_in) the gradient at ΔW: what the
whole update would need, as far as the random A shows it. One backward gives g_i of all samples of a batch: they meet in
no layer, so that row i of δ belongs to sample i alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from nara_diffusion.check.probe import tokens_of

HALVES = 2


class BinnedGradients:
    """Sums of g_i for each bin and half; inside `watching`, `add` runs one backward.

    Attributes:
        counts: (bins, 2), samples.

    Args:
        factors: the layers that hold B, {name of the adapted layer: its B}.
        bins: equal parts of λ's [0, 1].
    """

    def __init__(self, factors: Mapping[str, nn.Module], bins: int) -> None:
        self.factors, self.bins = dict(factors), bins
        self.counts = torch.zeros(bins, HALVES, dtype=torch.long)
        self._sums: dict[str, Tensor] = {}
        self._cells: Tensor | None = None  # of the samples of this backward

    @contextmanager
    def watching(self) -> Iterator[BinnedGradients]:
        """Forwards inside are ready for `add`."""
        with ExitStack() as stack:
            for name, module in self.factors.items():
                handle = module.register_forward_hook(self._hook(name))
                stack.callback(handle.remove)
            yield self

    def add(self, per_sample: Tensor, noise_level: Tensor) -> None:
        """Adds the gradients of the losses (b,) of a forward, whose samples have λ (b,)."""
        self._cells = self._count(noise_level)
        weights = [module.weight for module in self.factors.values()]
        torch.autograd.grad(per_sample.sum(), weights, allow_unused=True)  # type: ignore[arg-type]
        self._cells = None

    def grams(self) -> dict[str, Tensor]:
        """{layer: ⟨sum, sum⟩ (bins, 2, bins, 2)} of the sums over samples."""
        shape = (self.bins, HALVES, self.bins, HALVES)
        return {name: (own @ own.T).view(shape).double().cpu() for name, own in self._sums.items()}

    def _count(self, noise_level: Tensor) -> Tensor:
        """The cell (b,) of each sample: its bin, and the half that has fewer of it so far."""
        cells = []
        for bin_ in (noise_level.detach().cpu() * self.bins).long().clamp(0, self.bins - 1).tolist():
            half = int(self.counts[bin_, 0] > self.counts[bin_, 1])
            self.counts[bin_, half] += 1
            cells.append(bin_ * HALVES + half)
        return torch.tensor(cells)

    def _hook(self, name: str) -> Callable[[nn.Module, tuple[Any, ...], Tensor], None]:
        def hook(module: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> None:
            if output.requires_grad:
                z = tokens_of(module, inputs[0].detach())
                output.register_hook(lambda grad: self._collect(name, z, tokens_of(module, grad)))

        return hook

    def _collect(self, name: str, z: Tensor, grad: Tensor) -> None:
        if self._cells is None:  # another backward than that of `add`
            return
        if len(z) != len(self._cells):
            raise ValueError(
                f"{name} gets {len(z)} rows for {len(self._cells)} samples, so that their gradients can't be told "
                "apart: leave it out of target_modules."
            )
        own = torch.einsum("bld,blr->bdr", grad.float(), z.float()).flatten(1)  # (b, d_out r)
        if name not in self._sums:
            self._sums[name] = own.new_zeros(self.bins * HALVES, own.shape[1])
        self._sums[name].index_add_(0, self._cells.to(own.device), own)
