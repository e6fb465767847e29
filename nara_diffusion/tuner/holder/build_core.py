"""Making the core that a configuration describes."""

from __future__ import annotations

import torch
from torch import nn

from nara_diffusion.cores.constant import ConstantCore, IdentityCore
from nara_diffusion.cores.custom import build_custom_core
from nara_diffusion.cores.embeddings import make_embedding
from nara_diffusion.cores.hypernetwork import HypernetworkCore
from nara_diffusion.cores.knots import KnotsCore
from nara_diffusion.cores.rank_masks import BinsCore, RankMaskCore
from nara_diffusion.tuner.config import NaraConfig


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
    if config.core_type == "knots":
        return KnotsCore(rank, config.core_knots, scale=config.core_scale)
    if config.core_type != "hypernetwork":
        return build_custom_core(config, rank)
    return HypernetworkCore(
        rank,
        scale=config.core_scale,
        hidden_dims=config.core_hidden_dims,
        init=config.core_init,
        core_input=config.core_input,
        embedding=lambda: make_embedding(config.noise_embedding, config.noise_embedding_dim, config.fourier_scale),
    )


def needs_noise(config: NaraConfig) -> bool:
    """Whether an adapter of this configuration depends on λ, by its core or by its strength."""
    with torch.device("meta"):
        return config.strength is not None or bool(build_core(config, config.r).needs_noise)


def is_tied_to_rank(config: NaraConfig) -> bool:
    """Whether C has no parameters, but depends on the rank, so that each rank has a core of its own."""
    return config.core_type in ("rank_mask", "bins")
