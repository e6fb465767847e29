"""The step of `dllm.py --plan`, with the run's own model, masks and loss, but without data.

The rows are as long as the flags and the model's positions allow: --max_length tokens, with
--max_prompt_length of them in the prompt (by default all but one), plus the trained padding. All
tokens of the answers are masked, or half of them with complementary masks. A model with blocks is
trained on the last block. DiffusionGemma is trained on one canvas, in two passes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from nara_diffusion.training.adapters import build_adapter, method_of
from nara_diffusion.training.engines import recompute_activations
from nara_diffusion.training.planned_step import PlannedStep, dtype_of

from .canvas_corruption import CanvasBatch, corrupt_canvases
from .canvas_loss import canvas_loss
from .loss import batch_loss
from .masking import MaskedBatch, mask_answers
from .models.backbone import Backbone
from .models.pretrained import backbone_on_meta
from .models.quantised import check_roundable
from .text_arguments import (
    Arguments,
    TextLoss,
    adapter_options,
    collator_of,
    objective_options,
    set_block_length,
)
from .text_lengths import checked_lengths

_NF4 = 0.5 + 1 / 64 + 4 / (64 * 256)  # a constant for 64 numbers, in 8 bits with a scale for 256
_INT8 = 1.0  # and a scale for each row
_END = 1


def planned_text_step(args: Arguments) -> PlannedStep:
    """Return the training step of a text run, from the model's config.json only.

    Raises:
        ValueError: the run would fail because of its model, adapter or lengths.
    """
    dtype = torch.float32 if method_of(args).family == "full" else dtype_of(args)
    hub = {} if args.revision is None else {"revision": args.revision}
    backbone = backbone_on_meta(args.pretrained_model_name_or_path, dtype, **hub)
    set_block_length(backbone, args)
    packed = {}
    if args.is_quantised:
        check_roundable(backbone.config)
        size = _NF4 if args.load_in_4bit else _INT8
        packed = dict.fromkeys(_quantised_weights(backbone), size)
        for parameter in backbone.parameters():
            if parameter not in packed:
                parameter.data = parameter.data.float()  # as `prepare_quantised` does
    blocks = [] if Backbone(backbone).has_canvas else _blocks(backbone)  # twins aren't sharded
    if args.gradient_checkpointing:
        recompute_activations(backbone)
    length = checked_lengths(backbone, args.max_length, args.gen_length)
    options = objective_options(backbone, args)
    with torch.device("meta"):
        model = build_adapter(backbone, args, **adapter_options(backbone, args))
    batch = _longest_batch(model, args, length)
    rows, width = batch.input_ids.shape
    forward = f"{rows} x {width} tokens"
    if isinstance(batch, CanvasBatch):
        loss: Callable[..., TextLoss] = partial(canvas_loss, model, batch, **options)
        forward += f" and {batch.canvas.shape[1]} of a canvas"
    else:
        loss = partial(batch_loss, model, batch)
    return PlannedStep(
        model=model,
        loss=lambda: loss().loss,
        forward=forward,
        blocks=blocks,
        packed=packed,
    )


def _longest_batch(model: nn.Module, args: Arguments, length: int) -> MaskedBatch | CanvasBatch:
    """Return rows of `length` tokens and their padding, at most the model's positions."""
    limit = Backbone(model).position_limit or math.inf
    prompt = min(args.max_prompt_length or length, length - 1)
    if args.trained_padding == "gen_length":
        prompt = int(min(prompt, limit - args.gen_length))
    row = {"input_ids": [_END] * length, "prompt_length": prompt}
    batch: dict[str, Any] = collator_of(model, args, _END)([row] * args.train_batch_size)
    if Backbone(model).has_canvas:
        sizes = {
            "canvas_length": Backbone(model).configured("canvas_length"),
            "vocab_size": _END + 1,
        }
        return corrupt_canvases(**batch, **sizes, seed=0)
    block = Backbone(model).block_length
    if block is not None:
        width = batch["input_ids"].shape[1]
        last = (width - 1) // block * block
        batch["prompt_lengths"] = [last] * args.train_batch_size
        batch["answer_lengths"] = [width - last] * args.train_batch_size
    batch["noise_level"] = 0.5 if args.complementary else 1.0
    batch |= {"complementary": args.complementary, "block_length": block}
    return mask_answers(**batch, mask_token_id=0, seed=0)


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
