"""The output head at chosen positions, positions, and models that `load_backbone` reads beside those of acceptance."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PromptTuningConfig, get_peft_model
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import (
    BertConfig,
    BertForMaskedLM,
    BertForPreTraining,
    LlamaConfig,
    LlamaForCausalLM,
    ModernBertConfig,
    ModernBertForMaskedLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    RobertaConfig,
    RobertaForMaskedLM,
)
from transformers.modeling_outputs import CausalLMOutputWithPast

from nara_diffusion.dllm import generate, load_backbone, masked_diffusion_loss
from nara_diffusion.dllm.models.backbone import Backbone
from nara_diffusion.dllm.models.shifted_logits import ShiftedQwen2ForCausalLM
from tests.acceptance._text import backbone, nara
from tests.acceptance._tokenizers import save_tokenizer

VOCABULARY = 40
MASK = VOCABULARY - 1
SIZES = {"vocab_size": VOCABULARY, "hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 1}
SIZES |= {"num_attention_heads": 4}
HEADS = {"num_key_value_heads": 2}
IDS = torch.randint(6, MASK, (3, 14), generator=torch.Generator().manual_seed(0))
BATCH: dict[str, Any] = {
    "input_ids": IDS,
    "prompt_lengths": [3, 6, 1],
    "answer_lengths": [11, 3, 11],
    "seed": 2,
}


def dream() -> PreTrainedModel:
    config = Qwen2Config(**SIZES, **HEADS)
    config.is_causal = False
    return ShiftedQwen2ForCausalLM(config)


def llama(**targets: Any) -> Any:
    return get_peft_model(backbone(VOCABULARY), LoraConfig(r=3, init_lora_weights=False, **targets))


MODELS = {
    "tied": lambda: backbone(VOCABULARY, tie_word_embeddings=True),
    "dream": dream,
    "bert": lambda: BertForMaskedLM(BertConfig(**SIZES)),
    "modernbert": lambda: ModernBertForMaskedLM(ModernBertConfig(**SIZES, pad_token_id=0)),
    "LoRA on the head": lambda: llama(target_modules=["q_proj", "lm_head"]),
    "trained head": lambda: llama(target_modules=["q_proj"], modules_to_save=["lm_head"]),
    "NaRA on the head": lambda: nara(backbone(VOCABULARY), target_modules=["q_proj", "lm_head"]),
}


@pytest.mark.parametrize("kind", MODELS)
def test_loss_in_the_head_has_the_values_and_gradients_of_all_logits(kind: str) -> None:
    torch.manual_seed(3)
    model = MODELS[kind]().double().eval()
    Backbone(model).language_model.config.mask_token_id = MASK  # type: ignore[union-attr]
    found = []
    for options in ({"chunk_size": 4}, {"chunk_size": None}):
        result = masked_diffusion_loss(model, **BATCH, **options)
        trained = [p for p in model.parameters() if p.requires_grad]
        gradients = torch.autograd.grad(result.loss, trained, allow_unused=True)
        found.append([result.token_loss.detach(), *(g for g in gradients if g is not None)])
    for mine, expected in zip(*found, strict=True):
        torch.testing.assert_close(mine, expected, rtol=1e-5, atol=1e-5 * float(expected.abs().max()) + 1e-12)


def test_head_runs_at_the_masked_positions_alone_and_where_nothing_is_masked_it_has_a_gradient() -> None:
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


@pytest.mark.parametrize("how", ["capped", "compiled", "compiled in place"])
def test_models_whose_head_cannot_be_hooked_take_all_logits(how: str) -> None:
    model = backbone(VOCABULARY)
    expected = masked_diffusion_loss(model, **BATCH).loss
    other: Any = copy.deepcopy(model)
    if how == "capped":
        other.config.final_logit_softcapping = 30.0
    elif how == "compiled":
        other = torch.compile(other, backend="eager")
    else:
        other.compile(backend="eager")
    assert Backbone(other).head is None
    torch.testing.assert_close(masked_diffusion_loss(other, **BATCH).loss, expected)


def test_models_that_change_or_pack_their_logits_are_refused() -> None:
    class Doubled(LlamaForCausalLM):
        def forward(self, *args: Any, **kwargs: Any) -> Any:
            output = super().forward(*args, **kwargs)
            output.logits = torch.cat([output.logits, output.logits], -1)
            return output

    class Packed(LlamaForCausalLM):
        def forward(self, input_ids: Any, **kwargs: Any) -> Any:
            hidden = self.model(input_ids).last_hidden_state
            return CausalLMOutputWithPast(logits=self.lm_head(hidden.flatten(0, 1)).unflatten(0, input_ids.shape))

    config = backbone(VOCABULARY).config
    with pytest.raises(ValueError, match=r"Doubled changes what its output head returns.*pass chunk_size=None"):
        masked_diffusion_loss(Doubled(config), **BATCH)
    with pytest.raises(ValueError, match=r"shape \(42, 24\), expected \(3, 14, width\).* attn_implementation"):
        masked_diffusion_loss(Packed(config), **BATCH)
    with pytest.raises(ValueError, match="attn_implementation"):
        generate(Packed(config), IDS, gen_length=2)


def test_answer_at_the_start_of_a_row_is_refused_where_nothing_predicts_it() -> None:
    with pytest.raises(ValueError, match="begin the row with a BOS token"):
        masked_diffusion_loss(dream(), IDS, [0, 1, 2], mask_token_id=MASK)


def test_virtual_tokens_change_neither_positions_nor_shapes() -> None:
    base = backbone(VOCABULARY)
    model = get_peft_model(base, PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3))
    losses = [masked_diffusion_loss(model, **BATCH, **how) for how in ({}, {"chunk_size": None})]
    torch.testing.assert_close(losses[0].token_loss, losses[1].token_loss)
    assert losses[0].token_loss.shape == IDS.shape
    assert generate(model, IDS, gen_length=2).shape == (3, 16)
    assert Backbone(model).position_limit == 64 - 3
    with pytest.raises(ValueError, match="the model has 61 positions"):
        generate(model, IDS, gen_length=48)


# ---------------------------------------------------------------------- loading


def saved(folder: Path, model: PreTrainedModel, **changes: Any) -> str:
    for name, value in changes.items():
        setattr(model.config, name, value)
    model.eval().save_pretrained(folder)
    save_tokenizer(folder, VOCABULARY)
    return str(folder)


def logits(model: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(IDS).logits


ENCODERS = {
    "bert": lambda: BertForMaskedLM(BertConfig(**SIZES)),
    "roberta": lambda: RobertaForMaskedLM(RobertaConfig(**SIZES, pad_token_id=0)),
    "modernbert": lambda: ModernBertForMaskedLM(ModernBertConfig(**SIZES, pad_token_id=0)),
}


@pytest.mark.parametrize("kind", ENCODERS)
def test_encoders_are_loaded_as_they_are(tmp_path: Path, kind: str) -> None:
    stock = ENCODERS[kind]()
    model, tokenizer = load_backbone(saved(tmp_path, stock))
    assert type(model) is type(stock)
    assert torch.equal(logits(model), logits(stock))
    assert model.config.mask_token_id == tokenizer.mask_token_id == MASK


@pytest.mark.parametrize("model_class", [LlamaForCausalLM, Qwen2ForCausalLM])
def test_causal_models_become_bidirectional_and_qwen2_shifted_by_its_configuration(
    tmp_path: Path, model_class: Any
) -> None:
    stock = model_class(model_class.config_class(**SIZES, **HEADS))
    folder = saved(tmp_path, stock)
    model, _ = load_backbone(folder)
    stock.config.is_causal = False
    torch.testing.assert_close(logits(model), logits(stock))
    saved(tmp_path, stock, shifted_logits=True)
    if model_class is LlamaForCausalLM:
        with pytest.raises(ValueError, match="has shifted_logits, which Dream and Qwen2 have alone"):
            load_backbone(folder)
        return
    shifted, _ = load_backbone(folder)
    assert isinstance(shifted, ShiftedQwen2ForCausalLM)
    torch.testing.assert_close(logits(shifted)[:, 1:], logits(stock)[:, :-1])


def test_sliding_windows_are_refused(tmp_path: Path) -> None:
    model = Qwen2ForCausalLM(Qwen2Config(**SIZES, **HEADS, use_sliding_window=True, sliding_window=4))
    with pytest.raises(ValueError, match="use_sliding_window=True isn't supported"):
        load_backbone(saved(tmp_path, model))


def test_mask_token_is_named_by_id_or_by_text(tmp_path: Path) -> None:
    folder = saved(tmp_path, LlamaForCausalLM(LlamaConfig(**SIZES)))
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


def test_heads_of_other_tasks_in_the_files_are_left_out_and_other_tensors_refused(tmp_path: Path) -> None:
    folder = saved(tmp_path, BertForPreTraining(BertConfig(**SIZES)))
    assert type(load_backbone(folder)[0]) is BertForMaskedLM
    file = tmp_path / "model.safetensors"
    tensors = load_file(file)
    save_file(tensors | {"classifier.weight": torch.ones(3, 24)}, file, metadata={"format": "pt"})
    assert torch.equal(logits(load_backbone(folder)[0]), logits(BertForMaskedLM.from_pretrained(folder).eval()))
    save_file(tensors | {"other.weight": torch.ones(3, 24)}, file, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"1 not known to the model: other\.weight"):
        load_backbone(folder)
    del tensors["cls.predictions.transform.dense.weight"]
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"1 missing: cls\.predictions\.transform\.dense\.weight"):
        load_backbone(folder)


@pytest.mark.parametrize(
    ("broken", "message"),
    [
        ("model.safetensors", r"The weights of .* are cut off or damaged \(.*\): download them again"),
        ("tokenizer.json", r"The tokenizer of .* can't be loaded: "),
        ("config.json", r"There is no 'config\.json' in the folder '.*': name a folder of a model"),
    ],
)
def test_half_downloaded_model_is_named(tmp_path: Path, broken: str, message: str) -> None:
    folder = saved(tmp_path, LlamaForCausalLM(LlamaConfig(**SIZES)))
    file = tmp_path / broken
    content = file.read_bytes()
    file.unlink() if broken == "config.json" else file.write_bytes(content[: len(content) // 2])
    with pytest.raises(ValueError, match=message):
        load_backbone(folder)
    with pytest.raises(ValueError, match=r"^There is no folder 'gone/model', and the Hub, .* can't be reached"):
        load_backbone("gone/model")
