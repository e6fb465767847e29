"""Orthonormal initialisation of A, for cores that switch some of its directions off.

T-LoRA (arXiv 2507.05964) initialises A and B with singular vectors of a random matrix, so that the directions do not
overlap, and subtracts their initial product from each forward by frozen copies. Here B starts at zero, as in LoRA: the
adapted model starts as the base model, and no copies are needed.
"""

from __future__ import annotations

from typing import Any

import torch
from peft.tuners.lora.layer import Embedding
from torch import nn


@torch.no_grad()
def make_directions_orthonormal(layer: Any, adapter_name: str) -> None:
    """Replace the r directions of PEFT's layer: the rows of A (r, d_in …), or the columns of an embedding's B (d_out,
    r).

    With more directions than features, the features are orthonormal instead. The other factor stays zero.
    """
    embeds = isinstance(layer, Embedding)
    factor = layer.lora_embedding_B[adapter_name] if embeds else layer.lora_A[adapter_name].weight
    if not factor.is_meta:
        factor.copy_(nn.init.orthogonal_(torch.empty(factor.shape, dtype=torch.float32)))
