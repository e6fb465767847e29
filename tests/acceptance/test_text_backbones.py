"""`load_backbone` reads LLaDA's, Dream's, iLLaDA's and others' files into stock classes, without code from the files.

The reference is the stock class, bidirectional, whose tensors were written to the folder under the names of that
family; the names were taken from the published checkpoints.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import (
    BertConfig,
    BertForMaskedLM,
    BertForPreTraining,
    LlamaForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from nara_diffusion.dllm import load_backbone
from tests.acceptance._text import LLADA_TINY, TEMPLATE, backbone, word_tokenizer
from tests.helpers.rounding import rounding_of

VOCABULARY = 40
IDS = torch.randint(6, VOCABULARY, (3, 11), generator=torch.Generator().manual_seed(4))
REAL = torch.tensor([[1] * 11, [1] * 7 + [0] * 4, [1] * 9 + [0] * 2])
LLADA_NAMES = [
    (r"model\.embed_tokens\.", "model.transformer.wte."),
    (r"model\.norm\.", "model.transformer.ln_f."),
    (r"lm_head\.", "model.transformer.ff_out."),
    (r"model\.layers\.(\d+)\.", r"model.transformer.blocks.\1."),
    (r"\.input_layernorm\.", ".attn_norm."),
    (r"\.post_attention_layernorm\.", ".ff_norm."),
    (r"\.self_attn\.o_proj\.", ".attn_out."),
    (r"\.self_attn\.", "."),
    (r"\.mlp\.gate_proj\.", ".ff_proj."),
    (r"\.mlp\.up_proj\.", ".up_proj."),
    (r"\.mlp\.down_proj\.", ".ff_out."),
]
LLADA_CONFIG = json.loads(Path(LLADA_TINY, "config.json").read_text()) | {
    "auto_map": {"AutoConfig": "configuration_llada.Config", "AutoModelForCausalLM": "modeling_llada.Model"},
    **{"d_model": 24, "mlp_hidden_size": 40, "n_heads": 4, "n_kv_heads": 2, "n_layers": 2, "rope_theta": 5000.0},
    **{"embedding_size": VOCABULARY, "vocab_size": VOCABULARY},
}
SPECIAL = {"mask_token_id": VOCABULARY - 1, "eos_token_id": 1, "pad_token_id": 1}


SIZES: dict[str, Any] = {"vocab_size": VOCABULARY, "hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 2}
SIZES |= {"num_attention_heads": 4}


def stock_llama(**changes: Any) -> LlamaForCausalLM:
    rope = {"rope_type": "default", "rope_theta": 5000.0}
    return backbone(VOCABULARY, rms_norm_eps=1e-5, rope_parameters=rope, **changes)


def llada_names(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    renamed = {}
    for name, tensor in tensors.items():
        for ours, theirs in LLADA_NAMES:
            name = re.sub(ours, theirs, name)
        renamed[name] = tensor
    return renamed


def write(folder: Path, tensors: dict[str, Tensor], config: dict[str, Any]) -> str:
    word_tokenizer(VOCABULARY, chat=True).save_pretrained(folder)
    save_file({name: tensor.clone() for name, tensor in tensors.items()}, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(config))
    return str(folder)


def logits(model: nn.Module) -> Tensor:
    """At the positions that aren't padding."""
    with torch.no_grad():
        return model(IDS, attention_mask=REAL).logits[REAL.bool()]


def assert_same(found: Tensor, expected: Tensor, stock: nn.Module) -> None:
    torch.testing.assert_close(found, expected, rtol=0, atol=rounding_of(stock) * float(expected.abs().max()))


def test_llada_files_give_bidirectional_llama_logits(tmp_path: Path) -> None:
    stock = stock_llama()
    folder = write(tmp_path, llada_names(stock.state_dict()), LLADA_CONFIG | SPECIAL)
    model, tokenizer = load_backbone(folder)
    assert type(model) is LlamaForCausalLM
    assert not model.training
    assert_same(logits(model), logits(stock), stock)
    assert (model.config.mask_token_id, model.config.eos_token_id) == (VOCABULARY - 1, 1)
    assert tokenizer.mask_token_id == VOCABULARY - 1
    assert model.config.pad_token_id == tokenizer.pad_token_id == 2
    assert tokenizer.padding_side == "right"
    assert tokenizer.chat_template == TEMPLATE
    changed = IDS.clone()
    changed[:, -1] = 6 + (changed[:, -1] - 5) % 30
    with torch.no_grad():
        difference = (model(IDS).logits - model(changed).logits).abs().amax(-1)  # (b, l)
    assert (difference > 1e-4).all()  # every position sees the whole text
    model, _ = load_backbone(folder, dtype=torch.bfloat16, attn_implementation="eager")
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    assert model.config._attn_implementation == "eager"


def test_dream_files_give_qwen_logits_shifted_by_one(tmp_path: Path) -> None:
    stock = Qwen2ForCausalLM(Qwen2Config(**SIZES, num_key_value_heads=2)).eval()
    for parameter in stock.parameters():
        parameter.data += 0.3 * torch.randn(parameter.shape)  # its biases start at zero
    names = {"model_type": "Dream", "architectures": ["DreamModel"]}
    remote = {"auto_map": {"AutoConfig": "configuration_dream.DreamConfig", "AutoModel": "modeling_dream.DreamModel"}}
    config = stock.config.to_dict() | names | remote | SPECIAL
    model, tokenizer = load_backbone(write(tmp_path / "dream", stock.state_dict(), config))
    stock.config.is_causal = False
    with torch.no_grad():
        plain = stock(IDS, attention_mask=REAL).logits
    expected = torch.cat([plain[:, :1], plain[:, :-1]], 1)[REAL.bool()]
    assert_same(logits(model), expected, stock)
    assert model.config.mask_token_id == tokenizer.mask_token_id == VOCABULARY - 1
    model.save_pretrained(tmp_path / "again")  # as a Qwen2 with shifted_logits
    tokenizer.save_pretrained(tmp_path / "again")
    assert_same(logits(load_backbone(str(tmp_path / "again"))[0]), expected, stock)


@pytest.mark.parametrize("names", ["llada", "llama"])
def test_illada_files_have_stock_settings_and_both_names(tmp_path: Path, names: str) -> None:
    stock = stock_llama(tie_word_embeddings=True)
    tensors = {name: tensor for name, tensor in stock.state_dict().items() if name != "lm_head.weight"}
    config = stock.config.to_dict() | {"model_type": "illada", "architectures": ["iLLaDAModelLM"], "mask_token_id": 9}
    model, tokenizer = load_backbone(write(tmp_path, llada_names(tensors) if names == "llada" else tensors, config))
    assert_same(logits(model), logits(stock), stock)
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
    assert (model.config.mask_token_id, tokenizer.mask_token) == (9, "w9")


def test_files_unlike_the_stock_class_are_refused(tmp_path: Path) -> None:
    for change, more, named in [
        ({"alibi": True}, None, "alibi"),
        ({"block_type": "sequential"}, None, "block_type"),
        ({"model_type": "mamba"}, None, "mamba"),
        ({"model_type": "qwen2", "use_sliding_window": True}, None, "use_sliding_window=True isn't supported"),
        ({"n_layers": 3}, None, r"missing: model\.layers\.2"),
        (
            {},
            "model.transformer.blocks.0.q_proj.bias",
            r"not known to the model: model\.layers\.0\.self_attn\.q_proj\.bias",
        ),
    ]:
        tensors = llada_names(stock_llama().state_dict()) | ({} if more is None else {more: torch.ones(24)})
        folder = write(tmp_path, tensors, LLADA_CONFIG | SPECIAL | change)
        with pytest.raises(ValueError, match=named):
            load_backbone(folder)


# ---------------------------------------------------------------------- other models


def saved(folder: Path, model: PreTrainedModel, **changes: Any) -> str:
    return write(folder, model.eval().state_dict(), model.config.to_dict() | changes)


def plain_logits(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model(IDS).logits


@pytest.mark.parametrize("model_class", [LlamaForCausalLM, Qwen2ForCausalLM])
def test_causal_models_become_bidirectional(tmp_path: Path, model_class: Any) -> None:
    stock = model_class(model_class.config_class(**SIZES, num_key_value_heads=2))
    model, _ = load_backbone(saved(tmp_path, stock))
    stock.config.is_causal = False
    torch.testing.assert_close(plain_logits(model), plain_logits(stock))


def test_mask_token_is_set_by_id_or_text(tmp_path: Path) -> None:
    folder = saved(tmp_path, backbone(VOCABULARY))
    model, tokenizer = load_backbone(folder, mask_token_id=7)
    assert (model.config.mask_token_id, tokenizer.mask_token) == (7, "w7")
    model, tokenizer = load_backbone(folder, mask_token="w9")
    assert (model.config.mask_token_id, tokenizer.mask_token_id) == (9, 9)
    for options, message in (
        ({"mask_token": "nothing"}, "'nothing' isn't a token"),
        ({"mask_token_id": 40}, "outside the vocabulary"),
    ):
        with pytest.raises(ValueError, match=message):
            load_backbone(folder, **options)


def test_encoders_load_without_foreign_heads_and_tensors(tmp_path: Path) -> None:
    folder = saved(tmp_path, BertForPreTraining(BertConfig(**SIZES)))
    file = tmp_path / "model.safetensors"
    tensors = load_file(file)
    save_file(tensors | {"classifier.weight": torch.ones(3, 24)}, file, metadata={"format": "pt"})
    model, tokenizer = load_backbone(folder)
    assert type(model) is BertForMaskedLM
    assert torch.equal(plain_logits(model), plain_logits(BertForMaskedLM.from_pretrained(folder).eval()))
    assert model.config.mask_token_id == tokenizer.mask_token_id == VOCABULARY - 1
    save_file(tensors | {"other.weight": torch.ones(3, 24)}, file, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"1 not known to the model: other\.weight"):
        load_backbone(folder)
    del tensors["cls.predictions.transform.dense.weight"]
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"1 missing: cls\.predictions\.transform\.dense\.weight"):
        load_backbone(folder)


def test_half_downloaded_model_is_named(tmp_path: Path) -> None:
    for broken, message in [
        ("model.safetensors", r"The weights of .* are cut off or damaged \(.*\): download them again"),
        ("tokenizer.json", r"The tokenizer of .* can't be loaded: "),
        ("config.json", r"There is no 'config\.json' in the folder '.*'\. Give a folder of a model"),
    ]:
        folder = saved(tmp_path / broken.partition(".")[0], backbone(VOCABULARY))
        file = Path(folder, broken)
        content = file.read_bytes()
        file.unlink() if broken == "config.json" else file.write_bytes(content[: len(content) // 2])
        with pytest.raises(ValueError, match=message):
            load_backbone(folder)
    with pytest.raises(ValueError, match=r"^'gone/model' is not a local folder, and the Hub can't be reached"):
        load_backbone("gone/model")


@pytest.mark.parametrize("name", ["gone/model.gguf", "model.safetensors"])
def test_file_in_place_of_a_model_is_refused(name: str, tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(b"weights")
    with pytest.raises(ValueError, match=f"{name}' is the name of a file, expected a folder or a repository"):
        load_backbone(str(tmp_path / name))
