"""The output head at chosen positions, and positions beside virtual tokens."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from peft import LoraConfig, PromptTuningConfig, get_peft_model
from transformers import (
    BertConfig,
    BertForMaskedLM,
    LlamaForCausalLM,
    PreTrainedModel,
    Qwen2Config,
)
from transformers.modeling_outputs import CausalLMOutputWithPast

from nara_diffusion.dllm import generate, masked_diffusion_loss
from nara_diffusion.dllm.models.backbone import Backbone
from nara_diffusion.dllm.models.model_classes import ShiftedQwen2ForCausalLM
from tests.acceptance._text import backbone, nara

VOCABULARY = 40
MASK = VOCABULARY - 1
SIZES = {"vocab_size": VOCABULARY, "hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 1}
SIZES |= {"num_attention_heads": 4}
IDS = torch.randint(6, MASK, (3, 14), generator=torch.Generator().manual_seed(0))
BATCH: dict[str, Any] = {
    "input_ids": IDS,
    "prompt_lengths": [3, 6, 1],
    "answer_lengths": [11, 3, 11],
    "seed": 2,
}


def dream() -> PreTrainedModel:
    config = Qwen2Config(**SIZES, num_key_value_heads=2)
    config.is_causal = False
    return ShiftedQwen2ForCausalLM(config)


TRAINED_HEAD: dict[str, Any] = {
    "target_modules": ["q_proj"],
    "modules_to_save": ["lm_head"],
    "init_lora_weights": False,
}
MODELS = {
    "tied": lambda: backbone(VOCABULARY, tie_word_embeddings=True),
    "dream": dream,
    "bert": lambda: BertForMaskedLM(BertConfig(**SIZES)),
    "trained head": lambda: get_peft_model(backbone(VOCABULARY), LoraConfig(**TRAINED_HEAD)),
    "NaRA on the head": lambda: nara(backbone(VOCABULARY), target_modules=["q_proj", "lm_head"]),
}


@pytest.mark.parametrize("kind", MODELS)
def test_loss_in_head_matches_that_of_all_logits(kind: str) -> None:
    torch.manual_seed(3)
    model = MODELS[kind]().double().eval()
    Backbone(model).language_model.config.mask_token_id = MASK  # type: ignore[union-attr]
    tensors = []
    for options in ({"chunk_size": 4}, {"chunk_size": None}):
        result = masked_diffusion_loss(model, **BATCH, **options)
        trained = [p for p in model.parameters() if p.requires_grad]
        gradients = torch.autograd.grad(result.loss, trained, allow_unused=True)
        tensors.append([result.token_loss.detach(), *(g for g in gradients if g is not None)])
    for mine, expected in zip(*tensors, strict=True):
        torch.testing.assert_close(mine, expected, rtol=1e-5, atol=1e-5 * float(expected.abs().max()) + 1e-12)


def test_head_runs_only_at_masked_positions() -> None:
    model = backbone(VOCABULARY)
    rows: list[int] = []
    forward = model.lm_head.forward
    model.lm_head.forward = lambda hidden: (rows.append(hidden.shape[:-1].numel()), forward(hidden))[1]
    result = masked_diffusion_loss(model, **BATCH, chunk_size=5)
    assert sum(rows[1:]) == int(result.masked.sum())  # the first is one position of each row, for the hooks of others
    assert max(rows[1:]) <= 5
    model = backbone(VOCABULARY)
    short = masked_diffusion_loss(model, IDS[:1, :4], [3], noise_level=1e-3, seed=0)
    assert not short.masked.any()
    short.loss.backward()
    assert model.lm_head.weight.grad is not None


def test_backward_computes_all_chunks_but_the_last_again() -> None:
    model = backbone(VOCABULARY)
    rows: list[int] = []
    forward = model.lm_head.forward
    model.lm_head.forward = lambda hidden: (rows.append(hidden.shape[:-1].numel()), forward(hidden))[1]
    result = masked_diffusion_loss(model, **BATCH, chunk_size=5)
    first_pass = rows[1:]
    rows.clear()
    result.loss.backward()
    assert len(first_pass) > 2
    assert rows == first_pass[-2::-1]


def test_models_with_unhookable_head_take_all_logits() -> None:
    model = backbone(VOCABULARY, num_hidden_layers=1)
    expected = masked_diffusion_loss(model, **BATCH).loss
    capped, in_place = copy.deepcopy(model), copy.deepcopy(model)
    capped.config.final_logit_softcapping = 30.0
    in_place.compile(backend="eager")
    with torch.compiler.set_stance("force_eager"):  # tracing is slow
        for other in (capped, in_place, torch.compile(copy.deepcopy(model), backend="eager")):
            assert Backbone(other).head is None
            torch.testing.assert_close(masked_diffusion_loss(other, **BATCH).loss, expected)


def test_models_that_pack_their_batch_are_refused() -> None:
    class Packed(LlamaForCausalLM):
        def forward(self, input_ids: Any, **kwargs: Any) -> Any:
            hidden = self.model(input_ids).last_hidden_state
            return CausalLMOutputWithPast(logits=self.lm_head(hidden.flatten(0, 1)).unflatten(0, input_ids.shape))

    config = backbone(VOCABULARY).config
    with pytest.raises(ValueError, match=r"shape \(42, 24\), expected \(3, 14, width\).* attn_implementation"):
        masked_diffusion_loss(Packed(config), **BATCH)
    with pytest.raises(ValueError, match="attn_implementation"):
        generate(Packed(config), IDS, gen_length=2)


def test_answer_at_row_start_is_refused_when_unpredictable() -> None:
    with pytest.raises(ValueError, match="begin the row with a BOS token"):
        masked_diffusion_loss(dream(), IDS, [0, 1, 2], mask_token_id=MASK)


def test_virtual_tokens_change_neither_positions_nor_shapes() -> None:
    base = backbone(VOCABULARY)
    model = get_peft_model(base, PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3))
    for how in ({}, {"chunk_size": None}):
        actual = masked_diffusion_loss(model, **BATCH, **how)
        logits = model(actual.input_ids, attention_mask=actual.attention_mask).logits[:, 3:]  # the three first go
        expected = F.cross_entropy(logits.mT, IDS, reduction="none") * actual.masked
        torch.testing.assert_close(actual.token_loss, expected)
    assert generate(model, IDS, gen_length=2).shape == (3, 16)
    assert Backbone(model).position_limit == 64 - 3
    with pytest.raises(ValueError, match="the model has 61 positions"):
        generate(model, IDS, gen_length=48)
