"""Checkpoints in stock formats and Dream's, compared with the stock classes; mask tokens; remote code."""

from __future__ import annotations

import copy
import os
import shutil
from pathlib import Path

import pytest
import torch
from peft import get_peft_model
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import (
    AlbertConfig,
    AlbertForPreTraining,
    BertConfig,
    BertForMaskedLM,
    BertForPreTraining,
    LlamaConfig,
    LlamaForCausalLM,
    MobileBertConfig,
    MobileBertForMaskedLM,
    ModernBertConfig,
    ModernBertForMaskedLM,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
    RobertaConfig,
    RobertaForMaskedLM,
)

from nara_diffusion import NaraConfig, noise_level
from nara_diffusion.dllm import load_backbone
from nara_diffusion.dllm.models.shifted_logits import ShiftedLlamaForCausalLM, ShiftedQwen2ForCausalLM
from tests.dllm.models.checkpoints import (
    ATTENTION_MASK,
    INPUT_IDS,
    REAL,
    SIZES,
    bidirectional,
    dream_checkpoint,
    encoder_tokenizer,
    logits_of,
    stock_checkpoint,
)
from tests.helpers.adapted import relative_error
from tests.helpers.rounding import rounding_of


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


def test_a_tokenizer_that_is_whole_in_its_file_is_read_as_it_was_saved(tmp_path: Path) -> None:
    model = Qwen2ForCausalLM(Qwen2Config(**SIZES, num_key_value_heads=2))
    stock_checkpoint(tmp_path, model)
    words = Tokenizer(WordLevel({"[UNK]": 0, "ab-cd": 1, "[MASK]": 2, "[END]": 3}, unk_token="[UNK]"))
    words.pre_tokenizer = WhitespaceSplit()  # Qwen2's own rule would split at the hyphen
    special = {"mask_token": "[MASK]", "eos_token": "[END]", "unk_token": "[UNK]"}
    PreTrainedTokenizerFast(tokenizer_object=words, **special).save_pretrained(tmp_path)
    _, tokenizer = load_backbone(str(tmp_path))
    assert tokenizer("ab-cd ab-cd", add_special_tokens=False)["input_ids"] == [1, 1]


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
        shifted = torch.cat([plain[:, :1], plain[:, :-1]], 1)
        assert relative_error(model(INPUT_IDS).logits, shifted) < rounding_of(stock)  # its weights lie elsewhere


def test_sliding_windows_are_refused(tmp_path: Path) -> None:
    stock_checkpoint(
        tmp_path, Qwen2ForCausalLM(Qwen2Config(**SIZES)), {"use_sliding_window": True, "sliding_window": 4}
    )
    with pytest.raises(ValueError, match="use_sliding_window=True isn't supported"):
        load_backbone(str(tmp_path))


@pytest.mark.parametrize("name", ["gone", "me/gone", "examples/assets/gone", "/nowhere"])
def test_a_model_that_is_not_there_is_named(name: str) -> None:
    with pytest.raises(ValueError, match=rf"^There is no folder '{name}', and a model .* was not reached: [^\n]+$"):
        load_backbone(name)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        ({"model.safetensors": 50_000}, r"The weights of .*llada are cut off or damaged \(.*\): download them again"),
        ({"model.safetensors": 0}, r"The weights of .*llada are cut off or damaged"),
        ({"tokenizer.json": None, "tokenizer_config.json": None}, r"The tokenizer of .*llada can't be loaded: "),
        ({"tokenizer.json": 1_000}, r"The tokenizer of .*llada can't be loaded: "),
    ],
)
def test_a_half_downloaded_model_is_named(tmp_path: Path, damage: dict[str, int | None], message: str) -> None:
    folder = tmp_path / "llada"
    shutil.copytree("examples/assets/llada-tiny", folder)
    for name, size in damage.items():
        (folder / name).unlink() if size is None else os.truncate(folder / name, size)
    with pytest.raises(ValueError, match=message):
        load_backbone(str(folder))


def test_a_folder_without_a_model_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=rf"There is no 'config.json' in the folder '{tmp_path}': name a "):
        load_backbone(str(tmp_path))


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


def with_more_tensors(folder: Path, *names: str) -> BertForMaskedLM:
    """A BERT in `folder`, and tensors there that it doesn't have."""
    torch.manual_seed(6)
    stock = BertForMaskedLM(BertConfig(**SIZES, max_position_embeddings=32)).eval()
    stock.save_pretrained(folder)
    encoder_tokenizer(folder)
    file = folder / "model.safetensors"
    save_file(load_file(file) | {name: torch.randn(3, 24) for name in names}, file, metadata={"format": "pt"})
    return stock


def test_load_backbone_with_another_head_names_the_option_that_leaves_it_out(tmp_path: Path) -> None:
    stock = with_more_tensors(tmp_path, "classifier.weight", "cls.choice.scale", "classifiers.weight")
    message = (
        r"3 not known to the model: .*ignore_tensors=\['classifier', 'classifiers', 'cls.choice'\].*--ignore_tensors"
    )
    with pytest.raises(ValueError, match=message):
        load_backbone(str(tmp_path))
    with pytest.raises(ValueError, match=r"1 not known to the model: classifiers\.weight"):
        load_backbone(str(tmp_path), ignore_tensors=["classifier", "cls.choice"])
    model, _ = load_backbone(str(tmp_path), ignore_tensors=["classifier", "cls.choice", "classifiers.weight"])
    assert torch.equal(logits_of(model), logits_of(stock))


def test_load_backbone_with_one_name_to_ignore_takes_it_as_text(tmp_path: Path) -> None:
    stock = with_more_tensors(tmp_path, "classifier.weight")
    model, _ = load_backbone(str(tmp_path), ignore_tensors="classifier")
    assert torch.equal(logits_of(model), logits_of(stock))


def test_load_backbone_with_more_tensors_in_its_body_offers_no_option(tmp_path: Path) -> None:
    with_more_tensors(tmp_path, "classifier.weight", "bert.embeddings.more.weight")
    with pytest.raises(ValueError, match=r"2 not known to the model: bert\.embeddings\.more") as refusal:
        load_backbone(str(tmp_path))
    assert "ignore_tensors" not in str(refusal.value)


@pytest.mark.parametrize("name", ["cls.predictions.bias", "class"])  # the one is the model's, the other is nobody's
def test_load_backbone_with_a_name_to_ignore_that_nothing_has_is_refused(tmp_path: Path, name: str) -> None:
    with_more_tensors(tmp_path, "classifier.weight")
    with pytest.raises(ValueError, match=rf"ignore_tensors names '{name}', .*: classifier\.weight"):
        load_backbone(str(tmp_path), ignore_tensors=["classifier", name])


def test_load_backbone_leaves_out_albert_s_sentence_order_head(tmp_path: Path) -> None:
    torch.manual_seed(6)
    stock = AlbertForPreTraining(AlbertConfig(**SIZES, embedding_size=12, max_position_embeddings=32)).eval()
    stock.save_pretrained(tmp_path)
    encoder_tokenizer(tmp_path)
    model, _ = load_backbone(str(tmp_path))
    with torch.no_grad():
        expected = stock(INPUT_IDS, attention_mask=ATTENTION_MASK).prediction_logits[REAL]
    assert torch.equal(logits_of(model), expected)


def test_load_backbone_with_a_configuration_without_end_token_takes_the_tokenizer_s(tmp_path: Path) -> None:
    sizes = {"vocab_size": 40, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 24}
    widths = {"hidden_size": 24, "embedding_size": 12, "intra_bottleneck_size": 12, "true_hidden_size": 12}
    MobileBertForMaskedLM(MobileBertConfig(**sizes, **widths)).save_pretrained(tmp_path)
    encoder_tokenizer(tmp_path)
    model, _ = load_backbone(str(tmp_path))
    assert (model.config.eos_token_id, model.config.mask_token_id) == (3, 4)


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
