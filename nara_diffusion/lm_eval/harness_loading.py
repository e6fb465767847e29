"""Load the model that lm-eval measures, with its adapter, and choose its maximum text length."""

from __future__ import annotations

from typing import Any

import torch
from peft import PeftConfig
from peft.utils import CONFIG_NAME
from torch import nn
from transformers import PreTrainedTokenizerBase

import nara_diffusion  # noqa: F401 (registers NaRA with PEFT)
from nara_diffusion.dllm import load_backbone
from nara_diffusion.loaders.tensor_files import load_peft_adapter
from nara_diffusion.utils.repositories import naming_source


def load_adapted(
    pretrained: str | None,
    peft: str | None,
    device: str | torch.device | None,
    *,
    dtype: str = "auto",
    peft_revision: str | None = None,
    **backbone: Any,
) -> tuple[nn.Module, PreTrainedTokenizerBase]:
    """Return the model with its active adapter, and its tokenizer.

    The model is on its device and in evaluation mode.
    """
    if pretrained is None and peft is not None:
        with naming_source(peft, CONFIG_NAME, "an adapter of PEFT's"):
            pretrained = PeftConfig.from_pretrained(peft).base_model_name_or_path
    if not pretrained:
        raise ValueError(
            "--model_args names no model, nor does an adapter. Add pretrained=FOLDER_OR_REPOSITORY."
        )
    if backbone.get("load_in_8bit") or backbone.get("load_in_4bit"):
        # quantised weights can't be moved later
        backbone.setdefault("device_map", {"": str(device)})
    loaded, tokenizer = load_backbone(pretrained, dtype=dtype, **backbone)
    model: Any = loaded
    if "device_map" not in backbone:
        model = model.to(device)
    if peft is not None:
        options = {} if peft_revision is None else {"revision": peft_revision}
        model = load_peft_adapter(model, peft, **options)
    return model.eval(), tokenizer


def checked_max_length(given: int | None, limit: int | None) -> int:
    """Return max_length, which is `given` or, if None, the model's limit of positions."""
    if limit is None and given is None:
        raise ValueError(
            "The model's configuration has no limit of positions. Add max_length=N to --model_args."
        )
    length = int(given or limit or 0)
    if limit is not None and length > limit:
        raise ValueError(
            f"max_length is {given}, but the model has {limit} positions. Leave it out."
        )
    return length
