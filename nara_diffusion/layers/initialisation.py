"""Orthonormal directions: how A may start where C(λ) switches some of them off.

T-LoRA (arXiv 2507.05964) starts A and B with the singular vectors of a random matrix, so that no direction repeats
what another one knows, and takes the product that they start with out of each forward again, by frozen copies of both.
Here B is zero, as LoRA's is: the model is the base at every λ at first, and no copies are needed.
"""

from __future__ import annotations

from typing import Any

import torch
from peft.tuners.lora.layer import Embedding
from torch import nn


@torch.no_grad()
def make_directions_orthonormal(layer: Any, adapter_name: str) -> None:
    """Draw the r directions of PEFT's layer anew: rows of A (r, d_in …), in an embedding columns of B (d_out, r).

    With more directions than features, features are orthonormal instead. The other factor is zero already.
    """
    embeds = isinstance(layer, Embedding)
    factor = layer.lora_embedding_B[adapter_name] if embeds else layer.lora_A[adapter_name].weight
    if not factor.is_meta:
        factor.copy_(nn.init.orthogonal_(torch.empty(factor.shape, dtype=torch.float32)))
