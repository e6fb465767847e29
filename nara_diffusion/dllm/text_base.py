"""The base model of a text run, with its tokenizer, its kind and its settings of generation."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from nara_diffusion.training.engines import check_whole, loading_in
from nara_diffusion.training.run import Run
from nara_diffusion.utils.quantised import prepare_quantised
from nara_diffusion.utils.repositories import local_folder

from .decoding import Sampling
from .kinds import kind_of
from .kinds.text_kind import TextKind
from .models.backbone import Backbone
from .models.pretrained import load_backbone
from .text_arguments import Arguments


@dataclass(frozen=True)
class TextBase:
    """A loaded base model.

    Attributes:
        sampling: the settings of generation, with the model's own values for some of them.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    kind: TextKind
    sampling: Sampling


def load_base(args: Arguments, run: Run[Arguments]) -> TextBase:
    """Load the base model, and record the digest of its files.

    Raises:
        ValueError: see `load_backbone`; or the model doesn't take an argument.
    """
    with loading_in(run.accelerator, run.weights_dtype):
        model, tokenizer = load_model(args, run.weights_dtype, run.accelerator.device)
    backbone = Backbone(model)
    kind = kind_of(backbone, args)
    if kind.whole_because:
        check_whole(run.accelerator, kind.whole_because)
    if args.bits:
        prepare_quantised(model)
    folder = local_folder(args.pretrained_model_name_or_path, revision=args.revision)
    run.record_base_digests({"": folder})
    is_chat = tokenizer.chat_template is not None
    return TextBase(model, tokenizer, kind, kind.sampling(backbone, args.sampling(), is_chat))


def load_model(
    args: Arguments, dtype: torch.dtype, device: torch.device
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Return the model and the tokenizer that the arguments name.

    Args:
        device: the device of quantised weights, which can't be moved later. transformers would take
            a GPU even in a run on the CPU.
    """
    options: dict[str, Any] = {}
    for name in ("mask_token", "load_in_4bit", "load_in_8bit", "revision"):
        value = getattr(args, name)
        if value:
            options[name] = value
    if args.bits:
        options["device_map"] = {"": str(device)}
    model, tokenizer = load_backbone(args.pretrained_model_name_or_path, dtype=dtype, **options)
    kind_of(Backbone(model)).configure(model, args)
    return model, tokenizer
