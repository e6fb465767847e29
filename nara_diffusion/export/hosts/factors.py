"""The factors up · down of a module in a host's file, and those of several modules that the host has as one matrix.

    ΔW = up · down          the scale α/r is multiplied into `up`, so that alpha is the rank

Hosts keep modules that Diffusers splits, such as q, k and v, in one matrix. Its LoRA is block-diagonal and exact:

    [ΔW_q; ΔW_k; ΔW_v] = diag(up_q, up_k, up_v) · [down_q; down_k; down_v]
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from nara_diffusion.export.lora.plain_lora import PlainLoraLayer


@dataclass(frozen=True)
class Factors:
    """Attributes:
    down: (r, d_in), in a convolution (r, d_in, *kernel).
    up: (d_out, r), in a convolution (d_out, r, 1, …), times the scale.
    modules: the names of the modules in it, in the order of their rows in `down`.
    """

    down: Tensor
    up: Tensor
    modules: tuple[str, ...] = ()

    @property
    def rank(self) -> int:
        return len(self.down)


def factors_of(name: str, layer: PlainLoraLayer) -> Factors:
    """The factors of one layer, in its own dtype; the product with the scale is computed in float64.

    Raises:
        ValueError: an embedding, a bias of B or a grouped convolution, which hosts' files can't express.
    """
    unknown = [
        what
        for what, present in (
            ("is an embedding", layer.is_embedding),
            ("has a bias of B (lora_bias=True)", layer.bias is not None),
            ("is a grouped convolution", layer.B.shape[1] != len(layer.A)),
        )
        if present
    ]
    if unknown:
        raise ValueError(
            f"Module '{name}' {unknown[0]}, which files for other programs can't express: save the adapter in PEFT's "
            "format."
        )
    up = layer.B if layer.scaling == 1 else (layer.B.double() * layer.scaling).to(layer.B.dtype)
    return Factors(layer.A, up, (name,))


def fused(parts: Sequence[Factors | None], sizes: Sequence[int]) -> Factors:
    """Stack the parts of one matrix from top to bottom; the ΔW of a part without a LoRA is zero.

    Args:
        parts: None where a part has no LoRA. sizes: the rows of each part.
    """
    present = [part for part in parts if part is not None]
    up = present[0].up.new_zeros(sum(sizes), sum(part.rank for part in present))
    row = column = 0
    for part, size in zip(parts, sizes, strict=True):
        if part is not None:
            up[row : row + size, column : column + part.rank] = part.up
            column += part.rank
        row += size
    modules = tuple(name for part in present for name in part.modules)
    return Factors(torch.cat([part.down for part in present]), up, modules)


def fuse_into(
    found: dict[str, Factors], layers: Mapping[str, Factors], name: str, parts: Sequence[str], sizes: Sequence[int]
) -> None:
    """Add the matrix `name`, made of the modules `parts`, to `found`, if one of them is adapted."""
    own = [layers.get(part) for part in parts]
    if any(part is not None for part in own):
        found[name] = fused(own, sizes)
