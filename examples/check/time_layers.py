"""The layers of an image model that read the timestep: a cheap way to tell it λ."""

from __future__ import annotations

import re

from torch import nn

_TIME_LAYERS = re.compile(
    r"(.*\.)?(time_embedding\.linear_\d|time_emb_proj|time(step)?_embedder\.linear_\d|t_embedder\.mlp\.\d|time_proj"
    r"|norm\w*\.linear|\w*mod(ulation\w*)?\.(linear|\d))"
)


def time_layers(model: nn.Module) -> list[str]:
    """Return the names of a denoiser's linear layers that read the timestep's embedding.

    Layers that are already adapted are skipped.
    """
    named = model.named_modules()
    return [name for name, layer in named if isinstance(layer, nn.Linear) and _TIME_LAYERS.fullmatch(name)]
