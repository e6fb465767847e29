"""LLaDA and iLLaDA checkpoints, compared with a forward pass written by hand."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    BitsAndBytesConfig,
    LlamaConfig,
    LlamaForCausalLM,
)

from nara_diffusion.dllm import load_backbone, masked_diffusion_loss
from nara_diffusion.dllm.models.llada_conversion import KEY_MAPPING, checkpoint_name, llama_config
from tests.dllm.models.checkpoints import INPUT_IDS, REAL, logits_of
from tests.dllm.models.llada_reference import CONFIG, random_tensors, reference_logits, save_checkpoint


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


def test_llada_8b_has_its_size() -> None:
    sizes = {
        "d_model": 4096,
        "n_layers": 32,
        "n_heads": 32,
        "n_kv_heads": 32,
        "mlp_hidden_size": 12288,
        "embedding_size": 126464,
        "vocab_size": 126464,
        "max_sequence_length": 4096,
        "rope_theta": 500000.0,
        "mask_token_id": 126336,
        "eos_token_id": 126081,
        "pad_token_id": 126081,
    }
    config = llama_config(CONFIG | sizes)
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    assert round(sum(parameter.numel() for parameter in model.parameters()) / 1e9, 3) == 8.016
    assert config.rope_parameters["rope_theta"] == 500000.0


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
