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

*Corruption* with uniform random tokens, as in the training of DiffusionGemma:

    t ~ U(ε, 1) for each sample;  changed_j ~ Bernoulli(t) for each j of the canvas;  λ = t
    canvas_j = a token of the vocabulary, drawn uniformly, if changed_j; else the clean token

An answer is split into blocks of `canvas_length` positions, its *canvases*. One canvas is drawn for
each sample. The prompt and all earlier blocks stay clean. A drawn token may equal the clean token,
and the canvas doesn't show which tokens changed.

As in `masking`, random numbers depend only on (seed, index of the sample in the training stream),
and drawn λ are stratified.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import DiffusionGemmaForBlockDiffusion, DynamicCache

from nara_diffusion.noise.blocks import attention_argument
from nara_diffusion.noise.level import EVERYTHING, NoiseWindow

from .answer_places import Lengths, host_answers, moved
from .loss import by_chunks, token_cross_entropy
from .mask_draws import BLOCK_STREAM, draw_masks, noise_levels, random_of, seed_and_indices
from .models.backbone import Backbone
from .models.forward_rows import conditioned
from .models.model_classes import CACHE

_TOKEN_STREAM, _SELF_STREAM = 4, 5  # after those of `mask_draws`


@dataclass(frozen=True)
class CanvasBatch:
    """A batch after corruption, with one canvas for each sample.

    Attributes:
        input_ids: (b, l) the clean tokens, padded on the right.
        predicted: (b, l) bool, the positions that the encoder's loss counts: those of the answers,
            or of prompts and answers, except in the first column.
        places: (m,) the indices of True in the flattened `predicted`.
        starts: (b,) the start of each canvas in its row.
        canvas: (b, c) the corrupted tokens, which the decoder sees.
        targets: (b, c) the clean tokens.
        supervised: (b, c) bool, the positions inside the answer. Only these count in the loss.
        noise_level: (b,) float32, λ.
        self_conditioned: (b,) bool, the samples that see the logits of the first pass in the second
            pass; None if there is only one pass.
    """

    input_ids: Tensor
    predicted: Tensor
    places: Tensor
    starts: Tensor
    canvas: Tensor
    targets: Tensor
    supervised: Tensor
    noise_level: Tensor
    self_conditioned: Tensor | None


def corrupt_canvases(
    input_ids: Tensor,
    prompt_lengths: Lengths,
    *,
    canvas_length: int,
    vocab_size: int,
    answer_lengths: Lengths | None = None,
    noise_level: Tensor | float | None = None,
    generator: torch.Generator | None = None,
    seed: int | None = None,
    sample_indices: Lengths | None = None,
    group_size: int | None = None,
    window: NoiseWindow = EVERYTHING,
    self_conditioning: float = 0.5,
    predict_prompts: bool = False,
) -> CanvasBatch:
    """Replace a share λ of one canvas of each answer with random tokens.

    See the equations in the module's docstring. The positions of a canvas after the end of its
    answer always hold random tokens.

    The other arguments are those of `mask_answers`.

    Args:
        canvas_length: c, the number of positions in a block.
        vocab_size: the end of the range 0 … vocab_size − 1 that random tokens are drawn from.
        self_conditioning: the share of self-conditioned samples, in [0, 1]. With 0, there is no
            first pass.
        predict_prompts: True if the encoder's loss also counts the tokens of the prompts.

    Raises:
        ValueError: see `mask_answers`.
    """
    b, device = len(input_ids), input_ids.device
    on_host, ends = host_answers(input_ids, prompt_lengths, answer_lengths)  # (b, l)
    seed, indices = seed_and_indices(seed, sample_indices, generator, b)
    levels = noise_levels(noise_level, indices, seed, group_size, window=window)
    random = partial(random_of, seed)
    blocks = (on_host.sum(1) + canvas_length - 1) // canvas_length  # (b,)
    chosen = [random(BLOCK_STREAM, i).integers(n) for i, n in zip(indices, blocks, strict=True)]
    starts = moved(on_host.argmax(1) + canvas_length * np.array(chosen), device)  # (b,)
    answer = moved(on_host, device)
    is_predicted = on_host.copy()  # by the token before it
    if predict_prompts:
        is_predicted = np.arange(input_ids.shape[1]) < ends[:, None]
    is_predicted[:, 0] = False
    targets, supervised = _canvases(input_ids, answer, starts, canvas_length)
    tokens = [random(_TOKEN_STREAM, i).integers(vocab_size, size=canvas_length) for i in indices]
    noise = moved(np.stack(tokens), device)  # (b, c)
    everywhere = np.ones((b, canvas_length), dtype=bool)
    changed = moved(draw_masks(everywhere, levels, indices, seed=seed), device)  # (b, c)
    canvas = torch.where(changed | ~supervised, noise, targets)
    conditioned = None
    if self_conditioning:
        draws = np.array([random(_SELF_STREAM, i).random() for i in indices])
        conditioned = moved(draws < self_conditioning, device)
    return CanvasBatch(
        input_ids,
        moved(is_predicted, device),
        moved(np.flatnonzero(is_predicted), device),
        starts,
        canvas,
        targets,
        supervised,
        moved(levels, device),
        conditioned,
    )


def _canvases(
    input_ids: Tensor, answer: Tensor, starts: Tensor, canvas_length: int
) -> tuple[Tensor, Tensor]:
    """Return the canvases (b, c) of rows (b, l), and which of their positions are answers."""
    positions = starts[:, None] + torch.arange(canvas_length, device=starts.device)  # (b, c)
    inside = positions < input_ids.shape[1]
    positions = positions.clamp(max=input_ids.shape[1] - 1)
    return input_ids.gather(1, positions), answer.gather(1, positions) & inside


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

    There is a mask (b, 1, c, l + c) for each type of layer: a canvas sees itself, and a window of
    tokens before its start. Also pass a `DynamicCache()` without a configuration, since the cache
    has to keep all keys.
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
    return {
        "input_ids": batch.input_ids,
        "decoder_input_ids": batch.canvas,
        "decoder_position_ids": batch.starts[:, None] + keys[:c],  # (b, c)
        "decoder_attention_mask": masks,
    }


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
