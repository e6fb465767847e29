"""Add a learned bias b(λ) to the logit of the token that a DiffusionGemma canvas shows.

    z'_ij[v] = z_ij[v] + b(λ_i)  for v = canvas_ij, the token that position j of sample i shows
    b(λ) = 10 p_k                k = min(⌊λ n⌋, n − 1), p (n,) float32, zero at first

DiffusionGemma replaces tokens of its canvas with random tokens, and its input doesn't show how
many. By Bayes' rule, the log-odds that a token was not replaced are ln((1 − λ) / λ) plus a term
that depends on the text. A bias on the token's logit can learn the first term.
docs/results/blocks.md compares this bias with cores. Thanks to the factor 10, a learning rate that
suits A and B can move b as far as Bayes' rule requires.

z (b, c, v) is the output of `lm_head`, before the model's soft cap. λ is the λ of the decoder, as
for C(λ), from `noise_level(…)` or from a sampler. The p of an adapter is a tensor of its `CoreSet`,
so p is saved, loaded, frozen and deleted with the cores. The biases of active adapters are summed.
Disabled adapters add nothing. The strength or scale of an adapter does not change b.

`generate` and pipelines call the model's forward without its hooks, but they call `decoder` and
`lm_head` as modules, one after the other. A hook before the decoder computes the biases of its
canvas, and a hook after `lm_head` adds them once. Other calls of `lm_head`, such as the call for
the encoder's own loss, get no bias.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from nara_diffusion.cores.core import floor_of_share
from nara_diffusion.layers.offloading import onloaded
from nara_diffusion.noise.parts import Parts

from .finder import twins_of
from .holder import CoreHolder

SCALE = 10.0
"""b over the parameter p."""


def bias_at(numbers: Tensor, level: Tensor) -> Tensor:
    """Return b(λ) (m,), float32, for the parameter p (n,) and λ (m,); b is NaN if λ is NaN."""
    bins, level = len(numbers), level.to(numbers.device).float()
    chosen = floor_of_share(bins, level).clamp(0, bins - 1).nan_to_num()
    return SCALE * numbers.float()[chosen.long()] + 0 * level


def hook_logits(holder: CoreHolder) -> None:
    """Make the model of `holder` add b(λ) to its logits. Repeating is safe.

    Raises:
        ValueError: the model is not a DiffusionGemma with its output head.
    """
    root = holder.root
    twins, head = twins_of(root), getattr(root, "lm_head", None)
    if twins is None or not isinstance(head, nn.Module):
        raise ValueError(
            f"logit_bias_bins is for DiffusionGemmaForBlockDiffusion, and the model is a {type(root).__name__}: "
            "leave it out."
        )
    if not holder.logit_handles:
        before = partial(_before_decoder, holder)
        holder.logit_handles = (
            twins.decoder.register_forward_pre_hook(before, with_kwargs=True),
            twins.decoder.register_forward_hook(partial(_after_decoder, holder), always_call=True),
            head.register_forward_hook(partial(_after_head, holder)),
        )


@torch.compiler.disable(recursive=True)
def _before_decoder(
    holder: CoreHolder, decoder: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> None:
    """Compute the biases of a canvas, after the hook that gives C(λ) to the layers."""
    local, pushed = holder.channel.local, holder.channel.pushed()
    local.canvas = None
    if pushed is None or pushed.level is None:
        return
    shown: Tensor = kwargs["decoder_input_ids"] if "decoder_input_ids" in kwargs else args[0]
    total = _sum_of_biases(holder, pushed.level)
    if total is not None:
        local.canvas = shown, _of_positions(total, pushed.parts, shown)


def _sum_of_biases(holder: CoreHolder, level: Tensor) -> Tensor | None:
    """Return the sum of b(λ) (m,) over the active adapters, or None if no adapter has a bias."""
    total = None
    for name in holder.active_names():
        cores = holder.deviations.cores_of(name)
        if cores.logit_bias is None:
            continue
        with onloaded(cores):
            bias = bias_at(cores.logit_bias, level)
        total = bias if total is None else total + bias
    return total


def _of_positions(bias: Tensor, parts: Parts | None, shown: Tensor) -> Tensor:
    """Return b for each position (b, c), from b(λ) (1,) or (b,), or (b·k,) for parts."""
    if parts is not None:
        bias = bias.view(len(shown), parts.count)
        return bias.repeat_interleave(shown.shape[1] // parts.count, 1)
    return bias[:, None].expand(shown.shape)


@torch.compiler.disable(recursive=True)
def _after_decoder(holder: CoreHolder, decoder: nn.Module, args: tuple, output: object) -> None:
    """Forget the biases of a canvas if the decoder raised an error."""
    if output is None:
        holder.channel.local.canvas = None


@torch.compiler.disable(recursive=True)
def _after_head(
    holder: CoreHolder, head: nn.Module, args: tuple[Any, ...], logits: Tensor
) -> Tensor | None:
    """Add the biases to the canvas's logits (b, c, v) in float32, before the model caps them."""
    canvas = getattr(holder.channel.local, "canvas", None)
    if canvas is None or logits.shape[:-1] != canvas[0].shape:
        return None
    holder.channel.local.canvas = None
    shown, bias = canvas[0].to(logits.device), canvas[1].to(logits.device)
    changed = logits.to(torch.float32, copy=True)
    return changed.scatter_add_(-1, shown[..., None], bias[..., None])
