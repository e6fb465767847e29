"""Loading the model, the tokenizer and the adapter that --model_args names."""

from __future__ import annotations

from typing import Any

import torch
from peft import PeftConfig
from peft.utils import CONFIG_NAME
from transformers import PreTrainedTokenizerBase

import nara_diffusion  # noqa: F401 (registers NaRA with PEFT)
from nara_diffusion.dllm import load_backbone
from nara_diffusion.loaders.file import load_peft_adapter
from nara_diffusion.utils.naming import naming_source


def load_model(
    pretrained: str | None,
    peft: str | None,
    *,
    device: str | torch.device = "cpu",
    dtype: str = "auto",
    load_in_8bit: bool = False,
    load_in_4bit: bool = False,
    peft_revision: str | None = None,
    **backbone: Any,
) -> tuple[torch.nn.Module, PreTrainedTokenizerBase]:
    """The model in evaluation mode on its device, with its adapter active.

    Args:
        pretrained: folder or repository of the model; None takes the one that the adapter's configuration names.
        peft: folder or repository of any adapter that PEFT loads, such as a NaRA; None: no adapter.
        device: the device of the model, unless there is a device_map.
        dtype: the dtype of the weights, such as bfloat16; "auto": that of the checkpoint.
        load_in_8bit, load_in_4bit: quantise the weights by bitsandbytes; 4 bits are NF4 with double quantisation.
        peft_revision: of the adapter's repository.
        **backbone: further arguments of `load_backbone`: mask_token, shift_logits, revision, attn_implementation,
            device_map, ….

    Raises:
        ValueError: neither `pretrained` nor `peft`; see also `load_backbone`.
    """
    if pretrained is None and peft is None:
        raise ValueError("--model_args names no model: pretrained=FOLDER_OR_REPOSITORY, or peft=ADAPTER, or both")
    if pretrained is None:
        with naming_source(str(peft), CONFIG_NAME, "an adapter of PEFT's"):
            pretrained = PeftConfig.from_pretrained(str(peft)).base_model_name_or_path
    if not pretrained:
        raise ValueError(f"the adapter {peft} doesn't name the model it belongs to: add pretrained=… to --model_args")
    if load_in_8bit or load_in_4bit:
        backbone.setdefault("device_map", {"": str(device)})  # quantised weights can't be moved later
    bits = {"load_in_8bit": load_in_8bit, "load_in_4bit": load_in_4bit}
    model, tokenizer = load_backbone(pretrained, dtype=dtype, **bits, **backbone)
    if "device_map" not in backbone:
        model.to(device)  # type: ignore[arg-type]
    if peft is None:
        return model.eval(), tokenizer
    revision = {} if peft_revision is None else {"revision": peft_revision}
    return load_peft_adapter(model, peft, **revision).eval(), tokenizer
