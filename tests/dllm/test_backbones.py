"""Checkpoints of every kind, compared with a forward pass written by hand or with the stock class."""

from __future__ import annotations

import builtins
import copy
import json
from pathlib import Path

import pytest
import torch
from peft import get_peft_model
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models
from transformers import (
    BertConfig,
    BertForMaskedLM,
    BertForPreTraining,
    BitsAndBytesConfig,
    LlamaConfig,
    LlamaForCausalLM,
    ModernBertConfig,
    ModernBertForMaskedLM,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
    RobertaConfig,
    RobertaForMaskedLM,
)

from nara_diffusion import NaraConfig, noise_level
from nara_diffusion.dllm import load_backbone, masked_diffusion_loss
from nara_diffusion.dllm.llada_format import KEY_MAPPING, checkpoint_name
from nara_diffusion.dllm.shifted import ShiftedLlamaForCausalLM, ShiftedQwen2ForCausalLM

from .conftest import disturb
from .llada_reference import CONFIG, random_tensors, reference_logits, save_checkpoint, save_tokenizer

SIZES = {"vocab_size": 40, "hidden_size": 24, "intermediate_size": 56, "num_hidden_layers": 2, "num_attention_heads": 4}
INPUT_IDS = torch.randint(2, 40, (3, 11), generator=torch.Generator().manual_seed(4))
ATTENTION_MASK = torch.tensor([[1] * 11, [1] * 7 + [0] * 4, [0] * 3 + [1] * 8])
REAL = ATTENTION_MASK.bool()


@torch.no_grad()
def logits_of(model: torch.nn.Module) -> torch.Tensor:
    return model(INPUT_IDS, attention_mask=ATTENTION_MASK).logits[REAL]


@pytest.fixture(autouse=True)
def _nobody_is_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    def ask(*_: object) -> str:
        raise AssertionError("a question on the terminal")

    monkeypatch.setattr(builtins, "input", ask)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("heads", [4, 2, 1])
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("shards", [1, 3])
def test_llada_has_the_logits_of_its_description(
    tmp_path: Path, shards: int, tied: bool, heads: int, attention: str
) -> None:
    config = CONFIG | {"weight_tying": tied, "n_kv_heads": heads}
    tensors = random_tensors(config)
    save_checkpoint(tmp_path, config, tensors, shards=shards)
    model, tokenizer = load_backbone(str(tmp_path), attn_implementation=attention)
    assert type(model) is LlamaForCausalLM
    doubles = {name: tensor.double() for name, tensor in tensors.items()}
    expected = reference_logits(doubles, config, INPUT_IDS, REAL)[REAL]
    assert torch.allclose(logits_of(model.double()), expected, rtol=0, atol=1e-5 * expected.abs().max())
    assert (model.get_output_embeddings().weight is model.get_input_embeddings().weight) == tied
    assert (model.config.mask_token_id, model.config.pad_token_id, model.config.eos_token_id) == (39, 1, 1)
    assert (tokenizer.mask_token_id, tokenizer.pad_token_id, tokenizer.padding_side) == (39, 1, "right")
    assert not model.training


def test_llada_in_float32_is_close_to_the_reference_in_float32(tmp_path: Path) -> None:
    tensors = random_tensors(CONFIG)
    save_checkpoint(tmp_path, CONFIG, tensors)
    model, _ = load_backbone(str(tmp_path))
    expected = reference_logits(tensors, CONFIG, INPUT_IDS, REAL)[REAL]
    assert (logits_of(model) - expected).abs().max() < 2e-6 * expected.abs().max()


def test_every_position_sees_the_whole_sequence(tmp_path: Path) -> None:
    save_checkpoint(tmp_path, CONFIG, random_tensors(CONFIG))
    model, _ = load_backbone(str(tmp_path))
    changed = INPUT_IDS.clone()
    changed[:, -1] = (changed[:, -1] + 1) % 30
    with torch.no_grad():
        difference = (model(INPUT_IDS).logits - model(changed).logits).abs().amax(-1)
    assert (difference > 1e-4).all()


def test_the_end_token_s_embedding_is_trained_although_it_is_the_padding(tmp_path: Path) -> None:
    save_checkpoint(tmp_path, CONFIG, random_tensors(CONFIG))
    model, _ = load_backbone(str(tmp_path))
    model(torch.tensor([[1, 5]])).logits.sum().backward()
    assert model.get_input_embeddings().weight.grad[1].any()


def test_a_llada_saved_again_is_a_llama_with_the_same_logits(tmp_path: Path) -> None:
    save_checkpoint(tmp_path / "llada", CONFIG, random_tensors(CONFIG))
    model, tokenizer = load_backbone(str(tmp_path / "llada"))
    model.save_pretrained(tmp_path / "again")
    tokenizer.save_pretrained(tmp_path / "again")
    names = set(load_file(tmp_path / "again" / "model.safetensors"))
    assert "model.layers.2.mlp.down_proj.weight" in names
    assert not any("transformer" in name for name in names)
    again, _ = load_backbone(str(tmp_path / "again"))
    assert torch.equal(logits_of(again), logits_of(model))
    assert (again.config.mask_token_id, again.config.is_causal) == (39, False)
    assert torch.equal(logits_of(LlamaForCausalLM.from_pretrained(tmp_path / "again")), logits_of(model))


def test_from_pretrained_arguments_pass_through(tmp_path: Path) -> None:
    save_checkpoint(tmp_path, CONFIG, random_tensors(CONFIG), shards=2)
    model, _ = load_backbone(str(tmp_path), dtype=torch.bfloat16, local_files_only=True)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    model, _ = load_backbone(str(tmp_path), torch_dtype=torch.float64)
    assert {p.dtype for p in model.parameters()} == {torch.float64}
    with pytest.raises(ValueError, match="leave out config"):
        load_backbone(str(tmp_path), config=LlamaConfig())


def test_weights_stay_on_disk_where_device_map_says_so(tmp_path: Path) -> None:
    save_checkpoint(tmp_path, CONFIG, random_tensors(CONFIG), shards=2)
    whole, _ = load_backbone(str(tmp_path))
    device_map = {"model": "cpu", "lm_head": "disk"}
    model, _ = load_backbone(str(tmp_path), device_map=device_map, offload_folder=str(tmp_path / "offload"))
    assert model.lm_head.weight.device.type == "meta"
    assert torch.equal(logits_of(model), logits_of(whole))
    options = {"input_ids": INPUT_IDS, "prompt_lengths": [2, 3, 4], "seed": 0, "chunk_size": 4}
    loss = masked_diffusion_loss(model, **options).loss
    assert torch.equal(loss, masked_diffusion_loss(whole, **options).loss)


def test_key_patterns_have_one_group_and_names_round_trip(tmp_path: Path) -> None:
    assert all(pattern.count("(") <= 1 for pattern in KEY_MAPPING)
    tensors = random_tensors(CONFIG)
    save_checkpoint(tmp_path, CONFIG, tensors)
    model, _ = load_backbone(str(tmp_path))
    assert {checkpoint_name(name) for name in model.state_dict()} == set(tensors)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"alibi": True}, r"alibi=True \(only False\)"),
        ({"include_bias": True}, "include_bias=True"),
        ({"include_qkv_bias": True}, "include_qkv_bias=True"),
        ({"activation_type": "gelu"}, "activation_type='gelu'"),
        (
            {"block_type": "sequential", "layer_norm_type": "default"},
            "block_type='sequential'.*layer_norm_type='default'",
        ),
        ({"rope": False}, "rope=False"),
        ({"scale_logits": True}, "scale_logits=True"),
        ({"clip_qkv": 8.0}, "clip_qkv=8.0"),
        ({"residual_dropout": 0.1}, "residual_dropout=0.1"),
        ({"sliding_window": 8}, "sliding_window=8"),
        ({"attention_layer_norm": True}, "attention_layer_norm=True"),
        ({"multi_query_attention": True, "n_kv_heads": 2}, "n_kv_heads=2 contradicts multi_query_attention=True"),
        ({"d_model": None}, "lacks d_model"),
        ({"model_type": "mamba"}, r"has model_type 'mamba'. load_backbone knows LLaDA"),
    ],
)
def test_options_that_llama_can_t_express_are_refused_by_name(tmp_path: Path, change: dict, message: str) -> None:
    save_checkpoint(tmp_path, CONFIG, random_tensors(CONFIG))
    (tmp_path / "config.json").write_text(json.dumps(CONFIG | change))
    with pytest.raises(ValueError, match=message):
        load_backbone(str(tmp_path))


def test_multi_query_attention_stands_for_one_key_value_head(tmp_path: Path) -> None:
    config = CONFIG | {"n_kv_heads": 1}
    save_checkpoint(tmp_path, config | {"n_kv_heads": None, "multi_query_attention": True}, random_tensors(config))
    model, _ = load_backbone(str(tmp_path))
    assert model.config.num_key_value_heads == 1


@pytest.mark.parametrize("tied", [False, True])
def test_tensors_that_don_t_fit_are_refused_by_their_name_in_the_checkpoint(tmp_path: Path, tied: bool) -> None:
    tensors = random_tensors(CONFIG | {"weight_tying": tied})
    del tensors["model.transformer.blocks.1.attn_norm.weight"]
    tensors["model.transformer.blocks.0.q_proj.bias"] = torch.zeros(24)
    tensors["model.transformer.ln_f.weight"] = torch.ones(5)
    save_checkpoint(tmp_path, CONFIG | {"weight_tying": tied}, tensors)
    with pytest.raises(ValueError) as error:  # noqa: PT011
        load_backbone(str(tmp_path))
    message = str(error.value)
    assert "1 missing: model.transformer.blocks.1.attn_norm.weight" in message
    assert "1 not known to the model: model.transformer.blocks.0.q_proj.bias" in message
    assert "model.transformer.ln_f.weight (5,) instead of (24,)" in message


def test_an_untied_checkpoint_without_head_is_refused(tmp_path: Path) -> None:
    tensors = random_tensors(CONFIG)
    del tensors["model.transformer.ff_out.weight"]
    save_checkpoint(tmp_path, CONFIG, tensors)
    with pytest.raises(ValueError, match=r"missing: model\.transformer\.ff_out\.weight"):
        load_backbone(str(tmp_path))


# iLLaDA, Llama, Qwen2, Dream


def stock_checkpoint(folder: Path, model: torch.nn.Module, change: dict | None = None, *, mask: bool = True) -> None:
    torch.manual_seed(1)
    disturb(model, 0.2)
    model.save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text()) | (change or {})
    (folder / "config.json").write_text(json.dumps({key: value for key, value in config.items() if value != "drop"}))
    save_tokenizer(folder, 40, mask=mask)


def bidirectional(model: torch.nn.Module) -> torch.nn.Module:
    model.config.is_causal = False
    return model.eval()


@pytest.mark.parametrize("names", ["llada", "stock"])
def test_illada_has_stock_configuration_names_and_either_tensor_names(tmp_path: Path, names: str) -> None:
    config = CONFIG | {"weight_tying": True}
    tensors = random_tensors(config)
    save_checkpoint(tmp_path / "llada", config, tensors)
    reference, _ = load_backbone(str(tmp_path / "llada"))
    save_checkpoint(tmp_path / "illada", config, tensors)
    fields = {
        **reference.config.to_dict(),
        "model_type": "illada",
        "mask_token_id": 5,
        "architectures": ["iLLaDAModelLM"],
    }
    (tmp_path / "illada" / "config.json").write_text(json.dumps(fields))
    if names == "stock":
        stock = {name: tensor for name, tensor in reference.state_dict().items() if name != "lm_head.weight"}
        save_file(stock, tmp_path / "illada" / "model.safetensors", metadata={"format": "pt"})
    model, tokenizer = load_backbone(str(tmp_path / "illada"))
    assert torch.equal(logits_of(model), logits_of(reference))
    assert (model.config.mask_token_id, tokenizer.mask_token) == (5, "w5")


@pytest.mark.parametrize(
    ("model_class", "config_class"), [(LlamaForCausalLM, LlamaConfig), (Qwen2ForCausalLM, Qwen2Config)]
)
def test_plain_llama_and_qwen2_become_bidirectional(tmp_path: Path, model_class, config_class) -> None:
    stock = model_class(config_class(**SIZES, num_key_value_heads=2))
    stock_checkpoint(tmp_path, stock)
    model, _ = load_backbone(str(tmp_path))
    assert type(model) is model_class
    assert model.config.mask_token_id == 39
    assert torch.equal(logits_of(model), logits_of(bidirectional(stock)))


def dream_checkpoint(folder: Path) -> Qwen2ForCausalLM:
    """Dream's files: Qwen2's tensors, a configuration and a tokenizer that name classes of their own."""
    stock = Qwen2ForCausalLM(Qwen2Config(**SIZES, num_key_value_heads=2))
    change = {
        "model_type": "Dream",
        "architectures": ["DreamModel"],
        "auto_map": {"AutoConfig": "configuration_dream.DreamConfig", "AutoModel": "modeling_dream.DreamModel"},
        "mask_token_id": 39,
        "pad_token_id": 1,
        "layer_types": "drop",
    }
    stock_checkpoint(folder, stock, change)
    for file in folder.glob("*token*"):
        file.unlink()
    characters = ["Ġ", *"abcdefghijklmnopqrstuvwxyz"]
    vocab = {character: i for i, character in enumerate(characters)} | {"ab": 27}
    vocab |= {f"unused{i}": i for i in range(28, 38)}
    (folder / "vocab.json").write_text(json.dumps(vocab))
    (folder / "merges.txt").write_text("#version: 0.2\na b\n")
    added = {"38": "<|endoftext|>", "39": "<|mask|>"}
    settings = {
        "tokenizer_class": "DreamTokenizer",
        "auto_map": {"AutoTokenizer": ["tokenization_dream.DreamTokenizer", None]},
        "added_tokens_decoder": {
            i: {
                "content": text,
                "lstrip": False,
                "normalized": False,
                "rstrip": False,
                "single_word": False,
                "special": True,
            }
            for i, text in added.items()
        },
        "eos_token": "<|endoftext|>",
        "pad_token": "<|endoftext|>",
        "mask_token": "<|mask|>",
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return stock


def test_dream_is_shifted_once_through_saving_copying_and_adapters(tmp_path: Path) -> None:
    stock = bidirectional(dream_checkpoint(tmp_path / "dream"))
    model, tokenizer = load_backbone(str(tmp_path / "dream"))
    assert type(model) is ShiftedQwen2ForCausalLM
    with torch.no_grad():
        plain = stock(INPUT_IDS, attention_mask=ATTENTION_MASK).logits
    shifted = torch.cat([plain[:, :1], plain[:, :-1]], 1)[REAL]
    assert torch.allclose(logits_of(model), shifted, atol=1e-6)
    assert torch.allclose(logits_of(copy.deepcopy(model)), shifted, atol=1e-6)
    assert (tokenizer.mask_token_id, tokenizer.convert_ids_to_tokens(tokenizer("ab c")["input_ids"])[0]) == (39, "ab")

    model.save_pretrained(tmp_path / "again")
    tokenizer.save_pretrained(tmp_path / "again")
    again, _ = load_backbone(str(tmp_path / "again"))
    assert type(again) is ShiftedQwen2ForCausalLM
    assert torch.allclose(logits_of(again), shifted, atol=1e-6)

    adapted = get_peft_model(model, NaraConfig(r=3, target_modules=["q_proj"], core_hidden_dims=(8, 8)))
    with noise_level(adapted, 0.5):
        assert torch.allclose(logits_of(adapted), shifted, atol=1e-6)  # B = 0 at the start
    adapted.save_pretrained(tmp_path / "adapter")
    with pytest.raises(ValueError, match="masked_diffusion_loss"):
        again(INPUT_IDS, labels=INPUT_IDS)


def test_shift_logits_is_a_choice_for_llama(tmp_path: Path) -> None:
    stock = LlamaForCausalLM(LlamaConfig(**SIZES))
    stock_checkpoint(tmp_path, stock)
    model, _ = load_backbone(str(tmp_path), shift_logits=True)
    assert type(model) is ShiftedLlamaForCausalLM
    with torch.no_grad():
        plain = bidirectional(stock)(INPUT_IDS).logits
        assert torch.equal(model(INPUT_IDS).logits, torch.cat([plain[:, :1], plain[:, :-1]], 1))


def test_sliding_windows_are_refused(tmp_path: Path) -> None:
    stock_checkpoint(
        tmp_path, Qwen2ForCausalLM(Qwen2Config(**SIZES)), {"use_sliding_window": True, "sliding_window": 4}
    )
    with pytest.raises(ValueError, match="use_sliding_window=True isn't supported"):
        load_backbone(str(tmp_path))


# mask token


def test_without_a_mask_token_the_error_says_how_to_name_one(tmp_path: Path) -> None:
    stock_checkpoint(tmp_path, LlamaForCausalLM(LlamaConfig(**SIZES)), mask=False)
    with pytest.raises(ValueError, match=r"load_backbone\(…, mask_token='…'\) or load_backbone\(…, mask_token_id=N\)"):
        load_backbone(str(tmp_path))
    model, tokenizer = load_backbone(str(tmp_path), mask_token_id=7)
    assert (model.config.mask_token_id, tokenizer.mask_token) == (7, "w7")
    model, tokenizer = load_backbone(str(tmp_path), mask_token="w9")
    assert (model.config.mask_token_id, tokenizer.mask_token_id) == (9, 9)
    with pytest.raises(ValueError, match="'nothing' isn't a token"):
        load_backbone(str(tmp_path), mask_token="nothing")
    with pytest.raises(ValueError, match="pass one of them"):
        load_backbone(str(tmp_path), mask_token="w9", mask_token_id=8)
    with pytest.raises(ValueError, match="outside the vocabulary"):
        load_backbone(str(tmp_path), mask_token_id=40)


# encoders


def encoder_tokenizer(folder: Path) -> None:
    vocab = {"[PAD]": 0, "[UNK]": 1, "[CLS]": 2, "[SEP]": 3, "[MASK]": 4} | {f"w{i}": i for i in range(5, 40)}
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel(vocab, unk_token="[UNK]")),
        pad_token="[PAD]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        mask_token="[MASK]",
    )
    tokenizer.save_pretrained(folder)


ENCODERS = {
    "bert": lambda: BertForMaskedLM(BertConfig(**SIZES, max_position_embeddings=32)),
    "roberta": lambda: RobertaForMaskedLM(RobertaConfig(**SIZES, max_position_embeddings=32, pad_token_id=0)),
    "modernbert": lambda: ModernBertForMaskedLM(ModernBertConfig(**SIZES, max_position_embeddings=32, pad_token_id=0)),
}


@pytest.mark.parametrize("kind", ENCODERS)
def test_encoders_are_loaded_as_they_are(tmp_path: Path, kind: str) -> None:
    torch.manual_seed(2)
    stock = ENCODERS[kind]().eval()
    stock.save_pretrained(tmp_path)
    encoder_tokenizer(tmp_path)
    model, tokenizer = load_backbone(str(tmp_path))
    assert type(model) is type(stock)
    assert torch.equal(logits_of(model), logits_of(stock))
    assert (model.config.mask_token_id, model.config.pad_token_id) == (4, 0)
    assert tokenizer.eos_token is not None


def test_a_checkpoint_with_bert_s_other_heads_loads_and_one_without_mlm_head_doesn_t(tmp_path: Path) -> None:
    config = BertConfig(**SIZES, max_position_embeddings=32)
    BertForPreTraining(config).save_pretrained(tmp_path)
    encoder_tokenizer(tmp_path)
    model, _ = load_backbone(str(tmp_path))
    assert type(model) is BertForMaskedLM
    tensors = load_file(tmp_path / "model.safetensors")
    kept = {name: tensor for name, tensor in tensors.items() if not name.startswith("cls.predictions.transform")}
    save_file(kept, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"missing: cls\.predictions\.transform"):
        load_backbone(str(tmp_path))


# remote code


def test_code_of_other_checkpoints_runs_only_when_it_is_trusted(tmp_path: Path) -> None:
    folder = tmp_path / "own_model"
    stock = LlamaForCausalLM(LlamaConfig(**SIZES))
    auto_map = {"AutoConfig": "modeling_own.OwnConfig", "AutoModelForCausalLM": "modeling_own.OwnModel"}
    stock_checkpoint(folder, stock, {"model_type": "own_model", "architectures": ["OwnModel"], "auto_map": auto_map})
    (folder / "modeling_own.py").write_text(
        "from transformers import LlamaConfig, LlamaForCausalLM\n"
        "class OwnConfig(LlamaConfig):\n    model_type = 'own_model'\n"
        "class OwnModel(LlamaForCausalLM):\n    config_class = OwnConfig\n"
    )
    with pytest.raises(ValueError, match="right under trust_remote_code=True"):
        load_backbone(str(folder))
    model, _ = load_backbone(str(folder), trust_remote_code=True)
    assert type(model).__name__ == "OwnModel"
    assert model.config.mask_token_id == 39


def test_quantised_weights_are_those_of_the_stock_class(tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes")
    config = CONFIG | {"d_model": 64, "mlp_hidden_size": 128}
    save_checkpoint(tmp_path / "llada", config, random_tensors(config), shards=2)
    model, _ = load_backbone(str(tmp_path / "llada"))
    model.save_pretrained(tmp_path / "stock")
    options = {"quantization_config": BitsAndBytesConfig(load_in_4bit=True), "device_map": {"": "cpu"}}
    quantised, _ = load_backbone(str(tmp_path / "llada"), **options)
    stock = LlamaForCausalLM.from_pretrained(tmp_path / "stock", **options)
    assert type(quantised.model.layers[0].mlp.down_proj).__name__ == "Linear4bit"
    assert torch.equal(logits_of(quantised), logits_of(stock))
