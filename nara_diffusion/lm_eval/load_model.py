"""Loading the model, the tokenizer and the adapter that --model_args names."""

from __future__ import annotations

from typing import Any

import torch
from peft import PeftConfig
from peft.utils import CONFIG_NAME
from transformers import BitsAndBytesConfig, PreTrainedTokenizerBase

import nara_diffusion  # noqa: F401 (registers NaRA with PEFT)
from nara_diffusion.dllm import load_backbone
from nara_diffusion.loaders.file import load_peft_adapter
from nara_diffusion.noise.signals import MASKED_SHARE
from nara_diffusion.utils.named_source import naming_source

# Arguments of `load_backbone` that make sense on a command line.
BACKBONE_ARGUMENTS = (
    *("mask_token", "mask_token_id", "shift_logits", "ignore_tensors", "trust_remote_code", "attn_implementation"),
    *("device_map", "max_memory", "offload_folder", "subfolder", "cache_dir", "local_files_only", "token", "revision"),
)


def load_model(
    pretrained: str | None,
    peft: str | None,
    *,
    device: str | torch.device | None = None,
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
        device: the device of the model, unless there is a device_map; None: an accelerator if there is one.
        dtype: the dtype of the weights, such as bfloat16; "auto": that of the checkpoint.
        load_in_8bit, load_in_4bit: quantise the weights by bitsandbytes; 4 bits are NF4 with double quantisation.
        peft_revision: of the adapter's repository.
        **backbone: further arguments of `load_backbone`, see `BACKBONE_ARGUMENTS`.

    Raises:
        ValueError: neither `pretrained` nor `peft`; an unknown argument; an adapter with another definition of λ; see
            also `load_backbone`.
    """
    unknown = sorted(backbone.keys() - set(BACKBONE_ARGUMENTS))
    if unknown:
        raise ValueError(
            f"--model_args has {', '.join(unknown)}, which nara_dllm doesn't know; it takes pretrained, peft, dtype, "
            f"load_in_8bit, load_in_4bit, peft_revision, max_length, samples, seed, greedy, "
            f"{', '.join(BACKBONE_ARGUMENTS)}"
        )
    if pretrained is None:
        pretrained = _base_of(peft)
    if load_in_8bit or load_in_4bit:
        backbone["quantization_config"] = BitsAndBytesConfig(
            load_in_8bit=load_in_8bit,
            load_in_4bit=load_in_4bit,
            bnb_4bit_compute_dtype=torch.bfloat16,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
        )
    place = device or default_device()
    if "quantization_config" in backbone:
        backbone.setdefault("device_map", {"": str(place)})  # quantised weights can't be moved later
    model, tokenizer = load_backbone(pretrained, dtype=dtype, **backbone)
    if "device_map" not in backbone:
        model.to(place)  # type: ignore[arg-type]
    if peft is None:
        return model.eval(), tokenizer
    adapted = load_peft_adapter(model, peft, **({} if peft_revision is None else {"revision": peft_revision}))
    for config in adapted.peft_config.values():
        convention = getattr(config, "noise_convention", None)
        if convention not in (None, MASKED_SHARE):
            raise ValueError(
                f"the adapter {peft} was trained with λ as {convention!r}, and the λ of a masked-diffusion language "
                f"model is {MASKED_SHARE!r}: pass an adapter that was trained on such a model"
            )
    return adapted.eval(), tokenizer


def _base_of(peft: str | None) -> str:
    """The base model that an adapter's configuration names."""
    if peft is None:
        raise ValueError("--model_args names no model: pretrained=FOLDER_OR_REPOSITORY, or peft=ADAPTER, or both")
    with naming_source(peft, CONFIG_NAME, "an adapter of PEFT's"):
        base = PeftConfig.from_pretrained(peft).base_model_name_or_path
    if not base:
        raise ValueError(f"the adapter {peft} doesn't name the model it belongs to: add pretrained=… to --model_args")
    return base


def default_device() -> torch.device:
    """The accelerator that PyTorch sees, or the CPU."""
    found = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    return found or torch.device("cpu")
