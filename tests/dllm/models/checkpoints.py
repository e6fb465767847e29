"""Small checkpoints on disk, and the batch that they are compared on."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from tokenizers import Tokenizer, models
from transformers import (
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from tests.dllm.conftest import disturb

from .llada_reference import save_tokenizer

SIZES = {"vocab_size": 40, "hidden_size": 24, "intermediate_size": 56, "num_hidden_layers": 2, "num_attention_heads": 4}
INPUT_IDS = torch.randint(2, 40, (3, 11), generator=torch.Generator().manual_seed(4))
ATTENTION_MASK = torch.tensor([[1] * 11, [1] * 7 + [0] * 4, [0] * 3 + [1] * 8])
REAL = ATTENTION_MASK.bool()


@torch.no_grad()
def logits_of(model: torch.nn.Module) -> torch.Tensor:
    return model(INPUT_IDS, attention_mask=ATTENTION_MASK).logits[REAL]


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
