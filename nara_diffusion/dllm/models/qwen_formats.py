"""The families that publish a Qwen2, Qwen3 or Qwen3-MoE, and the class of each.

A family is a row of `FORMATS`. A saved copy is read again as the same class, since its config.json
says `block_length` and `shifted_logits`. dLLM's A2D checkpoints don't say which attention they were
trained with, so they see the whole text unless `block_length` is given.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from transformers import (
    PreTrainedConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

from . import config_fields
from .model_classes import (
    BlockQwen2ForCausalLM,
    BlockQwen3ForCausalLM,
    BlockQwen3MoeForCausalLM,
    ShiftedBlockQwen2ForCausalLM,
    ShiftedQwen2ForCausalLM,
)


@dataclass(frozen=True)
class QwenFormat:
    """The form in which a family publishes its models.

    Attributes:
        config_class: the stock configuration.
        published: the fields of config.json; None if they are those of the stock configuration.
        block_field: the field with the length of the attention's blocks; the saved copy has
            `block_length`.
        block_length: that length where the field is missing; None for attention to the whole text.
        is_shifted: True if position i predicts token i + 1.
    """

    config_class: type[PreTrainedConfig]
    published: config_fields.PublishedFields | None = None
    block_field: str = "block_length"
    block_length: int | None = None
    is_shifted: bool = False


FORMATS = {
    "qwen2": QwenFormat(Qwen2Config),
    "qwen3": QwenFormat(Qwen3Config),
    "qwen3_moe": QwenFormat(Qwen3MoeConfig),
    "a2d-qwen2": QwenFormat(Qwen2Config),
    "a2d-qwen3": QwenFormat(Qwen3Config),
    "dream": QwenFormat(Qwen2Config, config_fields.DREAM, is_shifted=True),
    "sdar": QwenFormat(Qwen3Config, config_fields.SDAR, "block_size", 4),
    "sdar_moe": QwenFormat(Qwen3MoeConfig, config_fields.SDAR_MOE, "block_size", 4),
    "fast_dllm_qwen": QwenFormat(Qwen2Config, config_fields.FAST_DLLM, "bd_size", 32, True),
}
"""{model_type: format}. SDAR's row is TraDo's, too."""
_CLASSES: Mapping[tuple[type[PreTrainedConfig], bool, bool], type[PreTrainedModel]] = {
    (Qwen2Config, False, False): Qwen2ForCausalLM,
    (Qwen2Config, False, True): ShiftedQwen2ForCausalLM,
    (Qwen2Config, True, False): BlockQwen2ForCausalLM,
    (Qwen2Config, True, True): ShiftedBlockQwen2ForCausalLM,
    (Qwen3Config, False, False): Qwen3ForCausalLM,
    (Qwen3Config, True, False): BlockQwen3ForCausalLM,
    (Qwen3MoeConfig, False, False): Qwen3MoeForCausalLM,
    (Qwen3MoeConfig, True, False): BlockQwen3MoeForCausalLM,
}
"""{(configuration, attends by blocks, is shifted): class}"""


def qwen_class_and_fields(
    family: str, fields: Mapping[str, Any]
) -> tuple[type[PreTrainedModel], type[PreTrainedConfig], dict[str, Any]]:
    """Return the class, its configuration's class and fields for those of a config.json.

    Raises:
        ValueError: a field is unknown, or has a value that the class can't express.
    """
    row = FORMATS[family]
    if row.published is not None:
        row.published.check(fields, row.config_class)
    qwen = {key: value for key, value in fields.items() if key != row.block_field}
    length = fields.get("block_length") or fields.get(row.block_field) or row.block_length
    is_shifted = fields.get("shifted_logits", row.is_shifted)
    if length is not None:
        qwen["block_length"] = length
    if is_shifted:
        qwen["shifted_logits"] = True
    return _CLASSES[row.config_class, length is not None, is_shifted], row.config_class, qwen
