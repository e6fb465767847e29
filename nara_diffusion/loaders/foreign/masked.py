"""A T-LoRA as an `AdapterPart`: a mask over λ switches off directions, or pairs of them."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from nara_diffusion.loaders.format import AdapterPart
from nara_diffusion.tuner.config import NaraConfig

Factors = tuple[Tensor, Tensor]
"""A (r, d_in, …) and B (d_out, r, …)."""


def masked_part(
    factors: Mapping[str, Factors], scale: float, rank_mask_min: int, origin: str, *, in_pairs: bool
) -> AdapterPart:
    """The part of a T-LoRA with these factors of each module, scaled by `scale`.

    Raises:
        ValueError: modules of different ranks, which the other programs mask by one rank; r_min above the rank.
    """
    ranks = sorted({len(A) for A, _ in factors.values()})
    size = 2 if in_pairs else 1
    if len(ranks) > 1:
        raise ValueError(
            f"{origin} has layers of ranks {', '.join(str(rank // size) for rank in ranks)}: T-LoRA masks all layers "
            "by one rank, so only files of one rank can be read."
        )
    if rank_mask_min not in range(1, ranks[0] // size + 1):
        raise ValueError(f"rank_mask_min is {rank_mask_min}: pass an integer from 1 to {ranks[0] // size}, its rank.")
    config = NaraConfig(
        r=ranks[0],
        lora_alpha=scale * ranks[0],  # type: ignore[arg-type]
        target_modules=sorted(factors),
        core_type="rank_mask_pairs" if in_pairs else "rank_mask",
        rank_mask_min=rank_mask_min,
    )
    tensors = {}
    for name, (A, B) in factors.items():
        tensors |= {f"{name}.lora_A.weight": A.contiguous(), f"{name}.lora_B.weight": B.contiguous()}
    return AdapterPart(config, tensors)
