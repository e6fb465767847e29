"""LLaDA2 and LLaDA-MoE checkpoints in stock classes, compared with the blocks by hand in float64."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import Qwen3MoeForCausalLM

from nara_diffusion.dllm import load_backbone
from nara_diffusion.dllm.models.model_classes import LLaDA2ForCausalLM
from nara_diffusion.dllm.tokenizer import stop_token_ids
from tests.helpers.mixtures import LLADA2, LLADA_MOE, MASK, VOCABULARY, ByHand, block_seen, write_checkpoint

KINDS = {"LLaDA2": (LLADA2 | {"block_length": 4}, LLaDA2ForCausalLM), "LLaDA-MoE": (LLADA_MOE, Qwen3MoeForCausalLM)}
IDS = torch.randint(6, VOCABULARY, (2, 11), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("experts", ["eager", "grouped_mm"])
@pytest.mark.parametrize("kind", KINDS)
def test_checkpoint_in_stock_class_has_manual_logits(kind: str, experts: str, attention: str, tmp_path: Path) -> None:
    fields, stock = KINDS[kind]
    by_hand = ByHand(fields, write_checkpoint(tmp_path, fields))
    # grouped products of experts, the default of transformers, aren't there in float64
    dtype, atol = (torch.float64, 1e-5) if experts == "eager" else (torch.float32, 1e-4)
    how = {"experts_implementation": experts, "attn_implementation": attention}
    model, tokenizer = load_backbone(str(tmp_path), dtype=dtype, **how)
    assert type(model) is stock
    assert model.config.mask_token_id == tokenizer.mask_token_id == MASK
    full = torch.stack([by_hand(row) for row in IDS])
    blocks = torch.stack([by_hand(row, block_seen(11, 4)) for row in IDS])
    assert float((full - blocks).abs().max()) > 1
    with torch.no_grad():
        logits = model(IDS).logits.double()
    torch.testing.assert_close(logits, blocks if kind == "LLaDA2" else full, rtol=0, atol=atol)


@pytest.mark.parametrize("kind", KINDS)
def test_padding_on_the_right_changes_nothing(kind: str, tmp_path: Path) -> None:
    fields, _ = KINDS[kind]
    by_hand = ByHand(fields, write_checkpoint(tmp_path, fields))
    model, _ = load_backbone(str(tmp_path), dtype=torch.float64, experts_implementation="eager")
    real = torch.arange(11) < torch.tensor([[11], [7]])
    with torch.no_grad():
        logits = model(IDS, attention_mask=real.long()).logits
    seen = block_seen(7, 4 if kind == "LLaDA2" else 7)
    torch.testing.assert_close(logits[1, :7], by_hand(IDS[1, :7], seen), rtol=0, atol=1e-5)


def test_attention_that_takes_no_block_mask_is_refused(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, LLADA2)
    model, _ = load_backbone(str(tmp_path))
    model.config._attn_implementation = "flex_attention"
    with pytest.raises(ValueError, match="takes no block mask"):
        model(IDS)


@pytest.mark.parametrize("kind", KINDS)
def test_saved_copy_has_public_names_and_loads_again(kind: str, tmp_path: Path) -> None:
    fields, stock = KINDS[kind]
    state = write_checkpoint(tmp_path / "public", fields)
    model, tokenizer = load_backbone(str(tmp_path / "public"))
    model.save_pretrained(tmp_path / "copy")
    tokenizer.save_pretrained(tmp_path / "copy")
    saved = load_file(tmp_path / "copy" / "model.safetensors")
    assert saved.keys() == state.keys()
    for key, value in state.items():
        torch.testing.assert_close(saved[key], value, rtol=0, atol=0)
    again, _ = load_backbone(str(tmp_path / "copy"))
    assert type(again) is stock
    with torch.no_grad():
        torch.testing.assert_close(again(IDS).logits, model(IDS).logits, rtol=0, atol=1e-5)


UNKNOWN: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "use_bias": (LLADA2, {"use_bias": True}),
    "no shared expert": (LLADA2, {"num_shared_experts": None}),
    "score_function": (LLADA2, {"score_function": "softmax"}),
    "moe_router_score_function": (LLADA_MOE, {"moe_router_score_function": "sigmoid"}),
    "shared_expert_intermediate_size": (LLADA_MOE, {"shared_expert_intermediate_size": 16}),
    "partial_rotary_factor": (LLADA_MOE, {"partial_rotary_factor": 0.5}),
}


@pytest.mark.parametrize("name", UNKNOWN)
def test_option_missing_in_stock_class_is_refused(name: str, tmp_path: Path) -> None:
    fields, change = UNKNOWN[name]
    write_checkpoint(tmp_path, fields | change)
    with pytest.raises(ValueError, match="shared.expert" if "shared" in name else name):
        load_backbone(str(tmp_path))


def test_missing_tensor_of_llada2_is_refused(tmp_path: Path) -> None:
    state = write_checkpoint(tmp_path, LLADA2)
    gone = "model.layers.1.attention.dense.weight"
    save_file({key: value for key, value in state.items() if key != gone}, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=r"missing: model.layers.1.self_attn.o_proj"):
        load_backbone(str(tmp_path))


def test_mask_and_turn_end_are_found_in_vocabulary(tmp_path: Path) -> None:
    """As in the public checkpoints of LLaDA2 and LLaDA-MoE: no file says which token is the mask."""
    write_checkpoint(tmp_path, LLADA_MOE)
    names = {"<mask>": "<|mask|>", "w9": "<|role_end|>"}
    for file in tmp_path.glob("*token*.json"):
        content = file.read_text()
        for old, new in names.items():
            content = content.replace(f'"{old}"', f'"{new}"')
        fields = json.loads(content)
        fields.pop("mask_token", None)
        file.write_text(json.dumps(fields))
    model, tokenizer = load_backbone(str(tmp_path))
    assert model.config.mask_token_id == tokenizer.mask_token_id == MASK
    assert set(stop_token_ids(model, tokenizer)) == {tokenizer.eos_token_id, 9}
