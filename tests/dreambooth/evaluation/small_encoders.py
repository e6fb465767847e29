"""Small random encoders with the true classes, saved as their makers save them, and images to give them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from PIL import Image
from tokenizers import Tokenizer, pre_tokenizers, processors
from tokenizers.models import WordLevel
from torch import nn
from transformers import (
    BitImageProcessorPil,
    CLIPConfig,
    CLIPImageProcessorPil,
    CLIPModel,
    Dinov2Config,
    Dinov2Model,
    PreTrainedTokenizerFast,
)

WORDS = ["<pad>", "<start>", "<end>", "<unk>", "a", "photo", "of", "red", "blue", "cube", "ball", "sks"]
TEXT_LENGTH = 9
SIZE = 16  # pixels


def images(*colours: tuple[int, int, int]) -> list[Image.Image]:
    """One image of each colour, with some texture, in sizes that no model takes as they are."""
    generator = torch.Generator().manual_seed(5)
    found = []
    for index, colour in enumerate(colours):
        noise = torch.randint(0, 60, (20 + index, 24, 3), generator=generator)
        found.append(Image.fromarray((torch.tensor(colour) // 2 + noise).byte().numpy()))
    return found


def random_images(n: int) -> list[Image.Image]:
    colours = torch.randint(0, 256, (n, 3), generator=torch.Generator().manual_seed(1)).tolist()
    return images(*(tuple(colour) for colour in colours))


def _spread(model: nn.Module) -> Any:
    """The same weights at every call, and as large as trained ones: to a fresh ViT all images look alike."""
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            around = 1.0 if "norm" in name and name.endswith("weight") else 0.0
            parameter.copy_(around + torch.randn(parameter.shape, generator=generator) * 0.3)
    return model.eval()


def tokenizer() -> PreTrainedTokenizerFast:
    words = Tokenizer(WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    words.post_processor = processors.TemplateProcessing(
        single="<start> $A <end>", special_tokens=[("<start>", 1), ("<end>", 2)]
    )
    special = {"pad_token": "<pad>", "bos_token": "<start>", "eos_token": "<end>", "unk_token": "<unk>"}
    return PreTrainedTokenizerFast(tokenizer_object=words, model_max_length=TEXT_LENGTH, **special)


def clip_model() -> CLIPModel:
    text = {
        "vocab_size": len(WORDS),
        "max_position_embeddings": TEXT_LENGTH,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    tower = {"hidden_size": 12, "intermediate_size": 20, "num_hidden_layers": 2, "num_attention_heads": 3}
    vision = {**tower, "image_size": SIZE, "patch_size": 8}
    return _spread(CLIPModel(CLIPConfig(text_config={**tower, **text}, vision_config=vision, projection_dim=7)))


def clip_processor() -> CLIPImageProcessorPil:
    return CLIPImageProcessorPil(size={"shortest_edge": SIZE}, crop_size={"height": SIZE, "width": SIZE})


def save_clip(folder: Path) -> Path:
    for part in (clip_model(), clip_processor(), tokenizer()):
        part.save_pretrained(folder)
    return folder


def dino_model() -> Dinov2Model:
    config = Dinov2Config(hidden_size=12, num_hidden_layers=2, num_attention_heads=3, image_size=SIZE, patch_size=8)
    return _spread(Dinov2Model(config))


def dino_processor() -> BitImageProcessorPil:
    return BitImageProcessorPil(size={"shortest_edge": SIZE}, crop_size={"height": SIZE, "width": SIZE})


def save_dino(folder: Path) -> Path:
    for part in (dino_model(), dino_processor()):
        part.save_pretrained(folder)
    return folder
