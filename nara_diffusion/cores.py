"""From a configuration to its core."""

from __future__ import annotations

import torch
from torch import nn

from .config import NaraConfig
from .core import ConstantCore, HypernetworkCore, IdentityCore, make_embedding
from .masks import BinsCore, RankMaskCore


def build_core(config: NaraConfig, rank: int) -> nn.Module:
    """The core that `config` describes, for layers of rank up to `rank`."""
    if config.core_type == "identity":
        return IdentityCore(rank)
    if config.core_type == "constant":
        return ConstantCore(rank, scale=config.core_scale, init=config.core_init)
    if config.core_type == "rank_mask":
        return RankMaskCore(rank, config.rank_mask_min)
    if config.core_type == "bins":
        return BinsCore(rank, config.core_bins)
    return HypernetworkCore(
        rank,
        scale=config.core_scale,
        hidden_dims=config.core_hidden_dims,
        init=config.core_init,
        core_input=config.core_input,
        embedding=lambda: make_embedding(config.noise_embedding, config.noise_embedding_dim, config.fourier_scale),
    )


def needs_noise(config: NaraConfig) -> bool:
    """Whether an adapter of this configuration depends on λ."""
    with torch.device("meta"):
        return bool(build_core(config, config.r).needs_noise)


def is_tied_to_rank(config: NaraConfig) -> bool:
    """Whether C of one rank is no block of C of a larger one, so that each rank needs a core of its own."""
    return config.core_type in ("rank_mask", "bins")
