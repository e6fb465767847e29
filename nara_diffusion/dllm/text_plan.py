"""The step that `dllm.py --plan` takes: the run's own model, masks and loss, and no data.

Its rows are the longest that the flags and the model's positions allow: --max_length tokens, of
them --max_prompt_length (else all but one) of the prompt, and the trained padding. All tokens of
the answers are masked; half of them under complementary masks.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from nara_diffusion.training.adapters import build_adapter, method_of
from nara_diffusion.training.optimization import recompute_activations
from nara_diffusion.training.planned_step import PlannedStep, dtype_of

from .batches import AnswerCollator
from .canvas import checked_lengths
from .loss import batch_loss, masked_diffusion_loss
from .masking import MaskedBatch, mask_answers
from .models.backbone import Backbone
from .models.pretrained import backbone_on_meta
from .objective import loss_of
from .text_arguments import Arguments

_NF4 = 0.5 + 1 / 64 + 4 / (64 * 256)  # a constant for 64 numbers, in 8 bits with a scale for 256
_INT8 = 1.0  # and a scale for each row
_END = 1


def planned_text_step(args: Arguments) -> PlannedStep:
    """Return the training step of a text run, from the model's config.json only.

    Raises:
        ValueError: as the run does for its model, adapter and lengths.
    """
    dtype = torch.float32 if method_of(args).family == "full" else dtype_of(args)
    hub = {} if args.revision is None else {"revision": args.revision}
    backbone = backbone_on_meta(args.pretrained_model_name_or_path, dtype, **hub)
    if loss_of(backbone) is not masked_diffusion_loss:
        raise ValueError(
            "--plan computes masked diffusion, and this model is trained by blocks: leave it out."
        )
    packed = {}
    if args.is_quantised:
        size = _NF4 if args.load_in_4bit else _INT8
        packed = dict.fromkeys(_quantised_weights(backbone), size)
        for parameter in backbone.parameters():
            if parameter not in packed:
                parameter.data = parameter.data.float()  # as `prepare_quantised` does
    blocks = _blocks(backbone)
    if args.gradient_checkpointing:
        recompute_activations(backbone)
    length = checked_lengths(backbone, args.max_length, args.gen_length)
    with torch.device("meta"):
        model = build_adapter(backbone, args)
    batch = _longest_batch(args, length, Backbone(model).position_limit or math.inf)
    rows, width = batch.input_ids.shape
    return PlannedStep(
        model=model,
        loss=lambda: batch_loss(model, batch).loss,
        forward=f"{rows} x {width} tokens",
        blocks=blocks,
        packed=packed,
    )


def _longest_batch(args: Arguments, length: int, limit: float) -> MaskedBatch:
    """Return a batch of masked rows of `length` tokens and their padding, at most `limit`."""
    prompt = min(args.max_prompt_length or length, length - 1)
    if args.trained_padding == "gen_length":
        prompt = int(min(prompt, limit - args.gen_length))
    row = {"input_ids": [_END] * length, "prompt_length": prompt}
    collator = AnswerCollator(_END, args.trained_padding, args.gen_length)
    batch: dict[str, Any] = collator([row] * args.train_batch_size)
    level = 0.5 if args.complementary else 1.0
    masking = {"noise_level": level, "complementary": args.complementary}
    return mask_answers(**batch, **masking, mask_token_id=0, seed=0)


def _quantised_weights(model: PreTrainedModel) -> Iterator[Tensor]:
    """Yield the weights that bitsandbytes rounds: those of linear layers, except the head."""
    head = model.get_output_embeddings()
    for module in model.modules():
        if isinstance(module, nn.Linear) and module is not head:
            yield module.weight


def _blocks(model: PreTrainedModel) -> list[nn.Module]:
    """Return the blocks that accelerate wraps for FSDP2."""
    names = model._no_split_modules or []
    return [module for module in model.modules() if type(module).__name__ in names]
