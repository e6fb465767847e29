"""The step of `dllm.py --plan`, with the run's own model, masks and loss, but without data.

The rows are as long as the flags and the model's positions allow: --max_length tokens, with
--max_prompt_length of them in the prompt (by default all but one), plus the trained padding. All
tokens of the answers are masked, or half of them with complementary masks. For a model with blocks,
the first row has no prompt, so its blocks beside their clean copies are as many as can be.
DiffusionGemma is trained on one canvas, in two passes.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from nara_diffusion.training.adapters import build_adapter
from nara_diffusion.training.arguments import method_of
from nara_diffusion.training.engines import recompute_activations
from nara_diffusion.training.planned_step import PlannedStep, dtype_of
from nara_diffusion.utils.quantised import INT8, NF4, check_roundable

from .kinds import kind_of
from .models.backbone import Backbone
from .models.pretrained import backbone_on_meta
from .prompt_places import checked_lengths
from .text_arguments import Arguments, adapter_options

_END = 1


def planned_text_step(args: Arguments) -> PlannedStep:
    """Return the training step of a text run, from the model's config.json only.

    Raises:
        ValueError: the run would fail because of its model, adapter or lengths.
    """
    dtype = torch.float32 if method_of(args).family == "full" else dtype_of(args)
    hub = {} if args.revision is None else {"revision": args.revision}
    model = backbone_on_meta(args.pretrained_model_name_or_path, dtype, **hub)
    kind = kind_of(Backbone(model), args)
    model.config.update(kind.changed_fields(args))
    packed: dict[Tensor, float] = {}
    if args.bits:
        check_roundable(model.config)
        size, head = NF4 if args.load_in_4bit else INT8, model.get_output_embeddings()
        for module in model.modules():  # bitsandbytes rounds all linear layers but the head
            if isinstance(module, nn.Linear) and module is not head:
                packed[module.weight] = size
        for parameter in model.parameters():
            if parameter not in packed:
                parameter.data = parameter.data.float()  # as `prepare_quantised` does
    if args.gradient_checkpointing:
        recompute_activations(model)
    length = checked_lengths(model, args.max_length, args.gen_length)
    kind.objective(args)
    with torch.device("meta"):
        adapted = build_adapter(model, args, **adapter_options(model, args))
    backbone = Backbone(adapted)
    # a batch of the longest rows and their padding, at most the model's positions
    prompt = min(args.max_prompt_length or length, length - 1)
    if args.trained_padding == "gen_length":
        prompt = int(min(prompt, (backbone.position_limit or math.inf) - args.gen_length))
    row = {"input_ids": [_END] * length, "prompt_length": prompt}
    batch = kind.collator(backbone, args, _END)([row] * args.train_batch_size)
    loss, forward = kind.plan(adapted, args, batch)
    return PlannedStep(model=adapted, loss=lambda: loss().loss, forward=forward, packed=packed)
