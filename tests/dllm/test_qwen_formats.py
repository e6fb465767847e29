"""SDAR, Fast-dLLM v2 and A2D checkpoints in stock classes, compared with Qwen2 and Qwen3 by hand in float64."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor
from transformers import Qwen2ForCausalLM, Qwen3ForCausalLM, Qwen3MoeForCausalLM

from nara_diffusion.dllm import load_backbone, masked_diffusion_loss
from nara_diffusion.dllm.models.model_classes import (
    BlockQwen2ForCausalLM,
    BlockQwen3ForCausalLM,
    BlockQwen3MoeForCausalLM,
    ShiftedBlockQwen2ForCausalLM,
)
from nara_diffusion.dllm.text_arguments import Arguments
from nara_diffusion.dllm.train import main
from pipelines.llada import LLaDAPipeline
from tests.acceptance._commands import ROOT, results, run
from tests.acceptance._runs import block_flags
from tests.helpers.mixtures import (
    A2D_QWEN2,
    A2D_QWEN3,
    FAST_DLLM,
    LLADA2,
    LLADA_MOE,
    MASK,
    SDAR,
    SDAR_MOE,
    VOCABULARY,
    ByHand,
    block_seen,
    write_checkpoint,
)

EAGER = {"experts_implementation": "eager"}  # grouped products of experts aren't there in float64
# name: fields, arguments, class, block length
FAMILIES: dict[str, tuple[dict[str, Any], dict[str, Any], type, int]] = {
    "SDAR": (SDAR, {}, BlockQwen3ForCausalLM, 4),
    "SDAR of other blocks": (SDAR, {"block_length": 3}, BlockQwen3ForCausalLM, 3),
    "SDAR with experts": (SDAR_MOE, EAGER, BlockQwen3MoeForCausalLM, 4),
    "SDAR with experts and other blocks": (SDAR_MOE, EAGER | {"block_length": 3}, BlockQwen3MoeForCausalLM, 3),
    "Fast-dLLM v2": (FAST_DLLM, {}, ShiftedBlockQwen2ForCausalLM, 4),
    "A2D-Qwen3": (A2D_QWEN3, {}, Qwen3ForCausalLM, 11),
    "A2D-Qwen3 by blocks": (A2D_QWEN3, {"block_length": 4}, BlockQwen3ForCausalLM, 4),
    "A2D-Qwen2": (A2D_QWEN2, {}, Qwen2ForCausalLM, 11),
    "A2D-Qwen2 by blocks": (A2D_QWEN2, {"block_length": 5}, BlockQwen2ForCausalLM, 5),
}
RND1_SHARES = {
    "attention_bias",
    "attention_dropout",
    "eos_token_id",
    "hidden_act",
    "hidden_size",
    "initializer_range",
    "intermediate_size",
    "mask_token_id",
    "max_position_embeddings",
    "max_window_layers",
    "num_attention_heads",
    "rope_theta",
    "tie_word_embeddings",
    "use_cache",
    "use_sliding_window",
    "vocab_size",
}
"""The fields that RND1's configuration has, as SDAR's."""
IDS = torch.randint(6, VOCABULARY, (2, 11), generator=torch.Generator().manual_seed(0))


def expected(fields: dict[str, Any], state: dict[str, Tensor], ids: Tensor, block: int) -> Tensor:
    logits = ByHand(fields, state)(ids, block_seen(len(ids), block))
    if fields is FAST_DLLM:
        return torch.cat([logits[:1], logits[:-1]])
    return logits


@pytest.mark.parametrize("name", FAMILIES)
def test_loaded_checkpoint_has_the_logits_by_hand(name: str, tmp_path: Path) -> None:
    fields, options, stock, block = FAMILIES[name]
    state = write_checkpoint(tmp_path / "public", fields)
    model, tokenizer = load_backbone(str(tmp_path / "public"), dtype=torch.float64, **options)
    assert type(model) is stock
    assert model.config.mask_token_id == tokenizer.mask_token_id == MASK
    real = torch.arange(11) < torch.tensor([[11], [7]])
    with torch.no_grad():
        logits = model(IDS, attention_mask=real).logits
        last = model(IDS, attention_mask=real, logits_to_keep=3).logits
        torch.testing.assert_close(last, logits[:, -3:], rtol=0, atol=1e-9)
    for row, length in ((0, 11), (1, 7)):
        by_hand = expected(fields, state, IDS[row, :length], block)
        torch.testing.assert_close(logits[row, :length], by_hand, rtol=0, atol=1e-5)
    model.save_pretrained(tmp_path / "copy")
    tokenizer.save_pretrained(tmp_path / "copy")
    assert load_file(tmp_path / "copy" / "model.safetensors").keys() == state.keys()
    how = {key: value for key, value in options.items() if key != "block_length"}
    again, _ = load_backbone(str(tmp_path / "copy"), dtype=torch.float64, **how)
    assert type(again) is stock
    with torch.no_grad():
        torch.testing.assert_close(again(IDS, attention_mask=real).logits, logits, rtol=0, atol=1e-9)


def test_absent_block_length_is_the_published_one(tmp_path: Path) -> None:
    for fields, key, published in ((SDAR, "block_size", 4), (SDAR_MOE, "", 4), (FAST_DLLM, "bd_size", 32)):
        write_checkpoint(tmp_path, {name: value for name, value in fields.items() if name != key})
        assert load_backbone(str(tmp_path))[0].config.block_length == published


@pytest.mark.parametrize("token", ["<|MASK|>", "|<MASK>|"])
def test_mask_token_is_read_from_the_vocabulary(token: str, tmp_path: Path) -> None:
    write_checkpoint(tmp_path, FAST_DLLM)
    for file in tmp_path.glob("*token*.json"):
        fields = json.loads(file.read_text().replace('"<mask>"', json.dumps(token)))
        fields.pop("mask_token", None)
        file.write_text(json.dumps(fields))
    model, tokenizer = load_backbone(str(tmp_path))
    assert model.config.mask_token_id == tokenizer.mask_token_id == MASK


def test_rnd1_is_a_bidirectional_qwen3_moe(tmp_path: Path) -> None:
    fields = LLADA_MOE | {"head_dim": 6, "moe_layer_freq": [1, 1, 1], "norm_topk_prob": True}
    by_hand = ByHand(fields, write_checkpoint(tmp_path, fields))
    rnd1_fields = {key: value for key, value in SDAR.items() if key in RND1_SHARES}
    rnd1_fields |= {"model_type": "rnd1", "moe_backend": "hf", "num_diffusion_steps": 256, "rms_norm_eps": 1e-5}
    rnd1_fields |= {
        "num_hidden_layers": 3,
        "num_key_value_heads": 4,
        "head_dim": 6,
        "num_experts": 8,
        "num_experts_per_tok": 3,
    }
    rnd1_fields |= {
        "moe_intermediate_size": 12,
        "norm_topk_prob": True,
        "mlp_only_layers": [],
        "decoder_sparse_step": 1,
    }
    rnd1_fields |= {
        "rope_scaling": False,
        "sliding_window": False,
        "output_router_logits": False,
        "router_aux_loss_coef": 0.001,
    }
    (tmp_path / "config.json").write_text(json.dumps(rnd1_fields))
    model, _ = load_backbone(str(tmp_path), dtype=torch.float64, experts_implementation="eager")
    assert type(model) is Qwen3MoeForCausalLM
    with torch.no_grad():
        torch.testing.assert_close(model(IDS).logits[0], by_hand(IDS[0]), rtol=0, atol=1e-5)


REFUSED = {
    "llava_llada": "images",
    "mmada": "images",
    "nemotron_labs_diffusion": "autoregressive loss",
    "wedlm": "causal attention",
}


@pytest.mark.parametrize("family", REFUSED)
def test_unsupported_family_is_refused_with_the_reason(family: str, tmp_path: Path) -> None:
    write_checkpoint(tmp_path, SDAR | {"model_type": family})
    with pytest.raises(ValueError, match=REFUSED[family]):
        load_backbone(str(tmp_path))


def test_unknown_fields_and_foreign_block_lengths_are_refused(tmp_path: Path) -> None:
    for fields in (SDAR, SDAR_MOE, FAST_DLLM):
        write_checkpoint(tmp_path, fields | {"expert_capacity": 3})
        with pytest.raises(ValueError, match="expert_capacity=3"):
            load_backbone(str(tmp_path))
    write_checkpoint(tmp_path, LLADA_MOE)
    with pytest.raises(ValueError, match="isn't of a family that has attention by blocks"):
        load_backbone(str(tmp_path), block_length=4)
    write_checkpoint(tmp_path, LLADA2)
    assert load_backbone(str(tmp_path), block_length=6)[0].config.block_length == 6


@pytest.mark.parametrize("name", ["SDAR", "SDAR with experts", "Fast-dLLM v2"])
def test_loss_is_that_by_hand(name: str, tmp_path: Path) -> None:
    """The whole answer is the last block, and all of it is masked."""
    fields, options, _, block = FAMILIES[name]
    state = write_checkpoint(tmp_path, fields)
    model, _ = load_backbone(str(tmp_path), dtype=torch.float64, **options)
    ids, start = IDS[:, : 2 * block].masked_fill(IDS[:, : 2 * block] == MASK, 7), block
    masked = ids.clone()
    masked[:, start:] = MASK
    loss = masked_diffusion_loss(model, ids, [start] * 2, noise_level=1.0, seed=0)
    for row in range(2):
        logits = expected(fields, state, masked[row], block)[start:]
        by_hand = F.cross_entropy(logits, ids[row, start:])
        torch.testing.assert_close(loss.per_sample[row].double(), by_hand, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", ["SDAR", "SDAR with experts", "Fast-dLLM v2"])
def test_blocks_of_one_pass_equal_single_passes(name: str, tmp_path: Path) -> None:
    """Each block is predicted after a clean text, as in sampling: by its noisy part and clean blocks."""
    fields, options, _, block = FAMILIES[name]
    state = write_checkpoint(tmp_path, fields)
    model, _ = load_backbone(str(tmp_path), dtype=torch.float64, **options)
    ids = torch.randint(6, MASK, (1, 3 * block), generator=torch.Generator().manual_seed(1))
    start = block - 1  # the answer begins inside the first block
    batch = masked_diffusion_loss(model, ids, [start], seed=3)
    levels = batch.noise_level[0]
    total = torch.zeros((), dtype=torch.float64)
    for number in range(3):
        begin, end = number * block, (number + 1) * block
        text = ids[0, :end].clone()
        masked = batch.masked[0, begin:end]
        text[begin:] = text[begin:].masked_fill(masked, MASK)
        logits = expected(fields, state, text, block)[begin:]
        losses = F.cross_entropy(logits, ids[0, begin:end], reduction="none")
        total += (losses * masked).sum() / float(levels[number])
    assert batch.masked.any()
    torch.testing.assert_close(batch.per_sample[0].double(), total / (3 * block - start), rtol=1e-6, atol=1e-6)


def test_pipeline_saves_and_loads_a_block_model(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "public", SDAR)
    pipe: Any = LLaDAPipeline.from_pretrained(str(tmp_path / "public"))
    pipe.save_pretrained(tmp_path / "copy")
    again: Any = LLaDAPipeline.from_pretrained(str(tmp_path / "copy"))
    assert type(again.transformer) is BlockQwen3ForCausalLM
    assert again.transformer.config.block_length == 4
    how: dict[str, Any] = {"gen_length": 8, "steps": 4}
    assert again("w7 w8 w9", **how).texts == pipe("w7 w8 w9", **how).texts


@pytest.mark.slow
def test_fast_dllm_run_trains_by_blocks_and_loads(tmp_path: Path) -> None:
    flags: dict[str, Any] = block_flags(tmp_path)
    flags |= {"output_dir": tmp_path / "run", "max_train_steps": 2, "test_samples": 1}
    write_checkpoint(tmp_path / "model", FAST_DLLM)
    arguments: dict[str, Any] = {
        name: str(value) if isinstance(value, Path) else value for name, value in flags.items()
    }
    main(Arguments(**arguments))
    config = json.loads((tmp_path / "run" / "adapter_config.json").read_text())
    assert (config["noise_convention"], config["noise_level_per"]) == ("masked_share_of_block", "part")
    scope: dict[str, Any] = {}
    exec((tmp_path / "run" / "README.md").read_text().split("```python")[1].split("```")[0], scope)
    assert scope["tokens"].shape[1] == scope["prompt"].shape[1] + 8


@pytest.mark.slow
def test_shipped_sdar_learns_and_answers_by_blocks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    shipped = "examples/assets/sdar-tiny"
    config = "train_scripts/configs/llada2_tiny.yaml"
    run("dllm.py", config=config, pretrained_model_name_or_path=shipped, output_dir=tmp_path)
    figures = results(tmp_path)
    assert (figures["exact_match_before"] < 0.2, figures["n"]) == (True, 256)
    assert figures["exact_match_after"] >= 0.9
    pipe: Any = LLaDAPipeline.from_pretrained(shipped)
    assert type(pipe.transformer) is BlockQwen3ForCausalLM
    pipe.load_nara_weights(tmp_path)
    test = Path("examples/assets/two-step/test.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in test[:100]]
    texts = [pipe(row["instruction"], gen_length=16).texts[0] for row in rows]
    right = [text == row["answer"] for text, row in zip(texts, rows, strict=True)]
    assert sum(right) >= 90
