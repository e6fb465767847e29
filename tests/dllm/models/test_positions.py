"""How many positions a model has, and what longer sequences are told."""

from __future__ import annotations

import logging

import pytest
import torch
from peft import PromptTuningConfig, get_peft_model
from transformers import (
    BertConfig,
    BertForMaskedLM,
    LlamaConfig,
    LlamaForCausalLM,
    ModernBertConfig,
    ModernBertForMaskedLM,
    NystromformerConfig,
    NystromformerForMaskedLM,
    PreTrainedModel,
    RobertaConfig,
    RobertaForMaskedLM,
)

from nara_diffusion.dllm.models.positions import check_positions, position_limit

SIZES = {"vocab_size": 50, "hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 1, "num_attention_heads": 4}
TABLES = {
    "bert": lambda: BertForMaskedLM(BertConfig(**SIZES, max_position_embeddings=19)),
    "roberta": lambda: RobertaForMaskedLM(RobertaConfig(**SIZES, max_position_embeddings=20, pad_token_id=0)),
    "nystromformer": lambda: NystromformerForMaskedLM(
        NystromformerConfig(**SIZES, max_position_embeddings=19, num_landmarks=19, segment_means_seq_len=19)
    ),
}
ROTARY = {
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**SIZES, max_position_embeddings=19)),
    "modernbert": lambda: ModernBertForMaskedLM(ModernBertConfig(**SIZES, max_position_embeddings=19, pad_token_id=0)),
}


@torch.no_grad()
def runs_on(model: PreTrainedModel, length: int) -> bool:
    try:
        model.eval()(torch.full((2, length), 7))
    except (IndexError, RuntimeError):
        return False
    return True


@pytest.mark.parametrize("name", TABLES)
def test_position_limit_of_a_table_is_the_longest_sequence_that_the_model_runs_on(name: str) -> None:
    model = TABLES[name]()
    assert position_limit(model) == 19
    assert runs_on(model, 19)
    assert not runs_on(model, 20)


@pytest.mark.parametrize("name", TABLES)
def test_check_positions_beyond_a_table_is_refused(name: str) -> None:
    model = TABLES[name]()
    check_positions(model, 19)
    with pytest.raises(ValueError, match=r"max_length is 20, .* table of 19 positions: .*--max_length 19"):
        check_positions(model, 20)


def test_check_positions_counts_virtual_tokens() -> None:
    config = PromptTuningConfig(task_type="FEATURE_EXTRACTION", num_virtual_tokens=4)
    model = get_peft_model(BertForMaskedLM(BertConfig(**SIZES, max_position_embeddings=19)), config)
    check_positions(model, 15)
    with pytest.raises(ValueError, match=r"table of 15 positions \(4 more are the adapter's virtual tokens\)"):
        check_positions(model, 16)


@pytest.mark.parametrize("name", ROTARY)
def test_check_positions_beyond_rotary_positions_warns_where_samples_are_longer(
    name: str, caplog: pytest.LogCaptureFixture
) -> None:
    model = ROTARY[name]()
    assert runs_on(model, 20)
    caplog.clear()
    with caplog.at_level(logging.WARNING):
        check_positions(model, 512)
        check_positions(model, 512, longest=19)
    assert caplog.messages == []
    with caplog.at_level(logging.WARNING):
        check_positions(model, 512, longest=20)
    (message,) = caplog.messages
    assert "samples have up to 20 tokens, and the model knows 19 positions" in message
    assert "--max_length 19" in message
