"""The objective of DiffusionGemma: one canvas per sample, denoised after a clean prefix.

    L = mean_i [ mean_j − log p(x_ij | canvas_i, prefix_i)  +  w · mean_k − log p(x_ik | x_i<k) ]

The first term is the loss of the decoder, over the positions j of a canvas that belong to the
answer, whether changed or not. It has no factor 1/λ. The second term is the next-token loss of the
encoder over the whole answer, or with `predict_prompts` over prompt and answer.

*Two passes*: the first pass has no gradient. In the second pass, samples with `self_conditioned`
see the logits of the first. Both passes run for every batch, so that all processes run the same
forwards. An encoder that isn't trained runs only once.

The encoder reads the whole clean row once, causally. The decoder's mask shows only the keys before
the canvas. In layers with a sliding window of n positions, it shows only the last n − 1 of them. A
cache of the prefix would hold the same keys.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DiffusionGemmaForBlockDiffusion, DynamicCache

from nara_diffusion.noise.blocks import attention_argument

from .canvas_corruption import CanvasBatch, corrupt_canvases
from .loss import by_chunks, token_cross_entropy
from .models.backbone import Backbone
from .models.forward_rows import conditioned
from .models.model_classes import CACHE


@dataclass(frozen=True)
class BlockDiffusionLoss(CanvasBatch):
    """The loss of a batch of b canvases.

    Attributes:
        loss: scalar, the mean of `per_sample` plus w times the mean of `encoder_loss`.
        per_sample: (b,) the decoder's loss for each sample, in nats per token.
        encoder_loss: (b,) the encoder's next-token loss for each sample; zeros if w is 0.
        token_loss: (b, c) cross-entropy in nats; zero outside the answer.
    """

    loss: Tensor
    per_sample: Tensor
    encoder_loss: Tensor
    token_loss: Tensor

    @property
    def sums(self) -> tuple[Tensor, Tensor]:
        """The decoder's loss for each sample and its weight, for `noise_level_curve`."""
        return self.per_sample, torch.ones_like(self.per_sample)


def block_diffusion_loss(
    model: nn.Module,
    input_ids: Tensor,
    prompt_lengths: Tensor | Sequence[int],
    *,
    encoder_weight: float = 1.0,
    **corruption: Any,
) -> BlockDiffusionLoss:
    """Corrupt one canvas of each answer, and return the loss of `model` in restoring it.

    Args:
        encoder_weight: w, 0 or more.
        **corruption: arguments of `corrupt_canvases` except canvas_length and vocab_size.

    Raises:
        ValueError: see `corrupt_canvases`.
    """
    config: Any = block_model(model).config
    batch = corrupt_canvases(
        input_ids,
        prompt_lengths,
        canvas_length=config.canvas_length,
        vocab_size=config.text_config.vocab_size,
        **corruption,
    )
    return canvas_loss(model, batch, encoder_weight)


def canvas_loss(
    model: nn.Module, batch: CanvasBatch, encoder_weight: float = 1.0, chunk_size: int = 256
) -> BlockDiffusionLoss:
    """Return the loss of a corrupted batch; see `block_diffusion_loss`.

    Args:
        chunk_size: the number of positions with encoder logits in memory at the same time.
    """
    inner = block_model(model)
    inputs, cache, encoded = decoder_inputs(inner, batch), DynamicCache(), None
    with conditioned(model, batch.noise_level):
        if batch.self_conditioned is not None:
            with torch.no_grad():
                first = model(**inputs, **{CACHE: cache})
            inputs["self_conditioning_logits"] = first.logits  # (b, c, v)
            inputs["self_conditioning_mask"] = batch.self_conditioned
            trained = any(weight.requires_grad for weight in inner.model.encoder.parameters())
            if trained and torch.is_grad_enabled():  # a backward needs the encoder's graph
                cache = DynamicCache()
            else:
                del inputs["input_ids"]  # the cache has them
                encoded = first.encoder_last_hidden_state
        output = model(**inputs, **{CACHE: cache})
    if encoded is None:
        encoded = output.encoder_last_hidden_state
    token_loss = token_cross_entropy(output.logits, batch.targets) * batch.supervised  # (b, c)
    per_sample = token_loss.sum(1) / batch.supervised.sum(1)
    loss = per_sample.mean()
    encoder_loss = torch.zeros_like(per_sample)
    if encoder_weight:
        encoder_loss = _next_token_loss(inner, encoded, batch, chunk_size)
        loss = loss + encoder_weight * encoder_loss.mean()
    return BlockDiffusionLoss(
        **vars(batch),
        loss=loss,
        per_sample=per_sample,
        encoder_loss=encoder_loss,
        token_loss=token_loss,
    )


def block_model(model: nn.Module) -> DiffusionGemmaForBlockDiffusion:
    """Return the DiffusionGemma in `model`."""
    inner = Backbone(model).language_model
    assert isinstance(inner, DiffusionGemmaForBlockDiffusion)
    return inner


def decoder_inputs(model: DiffusionGemmaForBlockDiffusion, batch: CanvasBatch) -> dict[str, Any]:
    """Return the arguments of a forward: clean rows, canvases, their positions, and the masks.

    Also pass a `DynamicCache()` without a configuration, since the cache has to keep all keys.
    """
    c = batch.canvas.shape[1]
    offsets = torch.arange(c, device=batch.canvas.device)
    return {
        "input_ids": batch.input_ids,
        "decoder_input_ids": batch.canvas,
        "decoder_position_ids": batch.starts[:, None] + offsets,  # (b, c)
        "decoder_attention_mask": _prefix_masks(model, batch),
    }


def _prefix_masks(model: DiffusionGemmaForBlockDiffusion, batch: CanvasBatch) -> dict[str, Tensor]:
    """Return, for each type of layer, the mask of the keys that a canvas sees, (b, 1, c, l + c).

    A canvas sees itself, and a window of tokens before its start.
    """
    text: Any = model.config.get_text_config()
    (b, c), length = batch.canvas.shape, batch.input_ids.shape[1]
    keys = torch.arange(length + c, device=batch.canvas.device)
    starts = batch.starts[:, None, None, None]
    masks = {}
    windows = {"full_attention": length, "sliding_attention": text.sliding_window - 1}
    for kind, window in windows.items():
        is_prefix = (keys < starts) & (keys >= starts - window)
        seen = (is_prefix | (keys >= length)).expand(b, 1, c, -1)
        masks[kind] = attention_argument(seen, text._attn_implementation, model.dtype)
    return masks


def _next_token_loss(
    model: DiffusionGemmaForBlockDiffusion, hidden: Tensor, batch: CanvasBatch, chunk_size: int
) -> Tensor:
    """Return the encoder's mean − log p of each row's predicted tokens (b,), from its states (b, l, d)."""
    cap, places = model.final_logit_softcapping, batch.places

    def loss(hidden: Tensor, targets: Tensor) -> Tensor:
        logits = torch.tanh(model.lm_head(hidden[0]).float() / cap) * cap  # (chunk, v)
        return token_cross_entropy(logits, targets)

    # outside of autocast, the head's dtype may differ from that of the hidden states
    predicting = hidden.flatten(0, 1)[None, places - 1].to(model.lm_head.weight.dtype)  # (1, m, d)
    of_places = by_chunks(loss, predicting, batch.input_ids.flatten()[places], chunk_size)
    losses = of_places.new_zeros(batch.predicted.numel()).scatter(0, places, of_places)
    return losses.view_as(batch.predicted).sum(1) / batch.predicted.sum(1)
