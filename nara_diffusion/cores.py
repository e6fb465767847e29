"""From a configuration to its core."""

from __future__ import annotations

from torch import nn

from .config import NaraConfig
from .core import ConstantCore, HypernetworkCore, IdentityCore, make_embedding


def build_core(config: NaraConfig, rank: int) -> nn.Module:
    """The core that `config` describes, for layers of rank up to `rank`."""
    if config.core_type == "identity":
        return IdentityCore(rank)
    if config.core_type == "constant":
        return ConstantCore(rank, scale=config.core_scale, init=config.core_init)
    return HypernetworkCore(
        rank,
        scale=config.core_scale,
        hidden_dims=config.core_hidden_dims,
        init=config.core_init,
        core_input=config.core_input,
        embedding=lambda: make_embedding(config.noise_embedding, config.noise_embedding_dim, config.fourier_scale),
    )
