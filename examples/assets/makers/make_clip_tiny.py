"""Trains clip-tiny, the small CLIP that encodes sdxl-tiny's prompts and measures its pictures.

    python examples/assets/makers/make_clip_tiny.py                                   # a quarter of an hour, one core
    python examples/assets/makers/make_clip_tiny.py --output_dir outputs/clip-smaller --text_width 64 --text_layers 2 \\
        --vision_width 64 --vision_layers 3 --seed 1 --max_train_steps 800              # sdxl-tiny's first text encoder

A CLIPModel on 64 × 64 pixels, trained with CLIP's contrastive loss on the scenes of tiny_drawings/scenes.py. A run that
was stopped goes on with --resume.

The tokenizer is CLIP's, with a vocabulary trimmed to the scenes' words: byte-pair merges are learnt from the words
until each is one token; the 256 bytes, inside a word and at its end, are tokens too, so that any text can be written.
"sks" is a word of the vocabulary that no caption has.

Written to --output_dir: model.safetensors, config.json, the processor's files, results.json and training_curve.csv;
and training_state.pt, which --resume reads and nobody else needs.
"""

# ruff: noqa: RUF009 (option() is dataclasses.field() with metadata, not a shared default)
from __future__ import annotations

import json
from collections import Counter
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import torch
from tiny_drawings.objects import COLOURS, KINDS
from tiny_drawings.places import PLACES
from tiny_drawings.scenes import (
    BEGINNINGS,
    SIDES,
    SIZE,
    SIZES,
    SUBJECT_WORD,
    distinct_scenes,
    render,
    scenes,
    training_caption,
)
from tiny_training import Plan, Training, load_as_float32, option, parse, write_results
from tokenizers import pre_tokenizers
from torch import Tensor, nn
from transformers import (
    CLIPConfig,
    CLIPImageProcessor,
    CLIPModel,
    CLIPProcessor,
    CLIPTextConfig,
    CLIPTokenizer,
    CLIPVisionConfig,
)

SPLIT = "clip"
RETRIEVAL_SIZE, RETRIEVAL_SPLIT, RETRIEVAL_SEED = 64, "retrieval", 2  # no other maker draws from this split
MAX_TOKENS = 24
START, END = "<|startoftext|>", "<|endoftext|>"
WORD_END = "</w>"


@dataclass
class Arguments:
    """What the command line sets."""

    output_dir: Path = option(Path("outputs/clip-tiny"), "folder of the model")
    text_width: int = option(96, "width of the text tower")
    text_layers: int = option(3, "layers of the text tower")
    vision_width: int = option(128, "width of the image tower")
    vision_layers: int = option(4, "layers of the image tower")
    max_train_steps: int = option(1000, "optimiser steps")
    train_batch_size: int = option(64, "scenes a step, each the others' counterexample")
    learning_rate: float = option(1e-3, "of AdamW, after warm-up and before decay")
    lr_warmup_steps: int = option(100, "steps of linear warm-up")
    save_steps: int = option(500, "steps between two saved states, each with a usable model beside it")
    retrieval_batches: int = option(8, "batches of 64 scenes in the final measurement")
    seed: int = option(0, "of weights and scenes")
    device: str = option("cpu", "torch device")
    resume: bool = option(False, "go on from the state in --output_dir")


def words() -> list[str]:
    """Every word of every caption, and the subject's."""
    phrases = [*BEGINNINGS, *SIZES, *SIDES, *PLACES, *KINDS, *COLOURS, "a", "an", "and", SUBJECT_WORD]
    return sorted({word for phrase in phrases for word in phrase.split()})


def learn_merges(texts: list[str]) -> list[tuple[str, str]]:
    """Byte-pair merges, the most frequent pair first, until each text is one token; the lesser of two equals wins, so
    that they are always the same (those of ``tokenizers.trainers`` are not)."""
    pieces = [[*text[:-1], text[-1] + WORD_END] for text in texts]
    merges: list[tuple[str, str]] = []
    while counts := Counter(pair for word in pieces for pair in pairwise(word)):
        merges.append(min(counts, key=lambda pair: (-counts[pair], pair)))
        pieces = [_merged(word, merges[-1]) for word in pieces]
    return merges


def _merged(word: list[str], pair: tuple[str, str]) -> list[str]:
    """The word's pieces with every occurrence of ``pair`` made one."""
    out: list[str] = []
    for piece in word:
        if out and (out[-1], piece) == pair:
            out[-1] += piece
        else:
            out.append(piece)
    return out


def build_tokenizer() -> CLIPTokenizer:
    """A CLIPTokenizer in which each of the words is one token."""
    merges = learn_merges(words())
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens = alphabet + [letter + WORD_END for letter in alphabet] + ["".join(pair) for pair in merges]
    vocabulary = {token: number for number, token in enumerate([*dict.fromkeys(tokens), START, END])}
    return CLIPTokenizer(vocabulary, merges, model_max_length=MAX_TOKENS)


def save_tokenizer(tokenizer: CLIPTokenizer, folder: Path) -> None:
    """Writes vocab.json and merges.txt, CLIP's own files, beside those of ``save_pretrained``."""
    tokenizer.save_pretrained(folder)
    tokenizer.backend_tokenizer.model.save(str(folder))


def build_clip(args: Arguments, processor: CLIPProcessor) -> CLIPModel:
    """CLIP's two towers, 16 wide a head (32 in the image tower), patches of 8 pixels, a shared space of 64."""
    tokenizer = processor.tokenizer
    text = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=args.text_width,
        intermediate_size=4 * args.text_width,
        projection_dim=64,
        num_hidden_layers=args.text_layers,
        num_attention_heads=args.text_width // 16,
        max_position_embeddings=MAX_TOKENS,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    vision = CLIPVisionConfig(
        hidden_size=args.vision_width,
        intermediate_size=4 * args.vision_width,
        projection_dim=64,
        num_hidden_layers=args.vision_layers,
        num_attention_heads=args.vision_width // 32,
        image_size=SIZE,
        patch_size=8,
    )
    return CLIPModel(CLIPConfig(text_config=text.to_dict(), vision_config=vision.to_dict(), projection_dim=64))


def build_processor() -> CLIPProcessor:
    """Pictures of SIZE × SIZE pixels, centred crops of others, values in [-1, 1]; and the trimmed tokenizer."""
    images = CLIPImageProcessor(
        size={"shortest_edge": SIZE},
        crop_size={"height": SIZE, "width": SIZE},
        image_mean=[0.5] * 3,
        image_std=[0.5] * 3,
    )
    return CLIPProcessor(images, build_tokenizer())


def contrastive_loss(training: Training, processor: CLIPProcessor) -> dict[str, Tensor]:
    """CLIP's loss on the scenes of the present step."""
    batch = training.plan.batch
    batch_of_scenes = scenes(SPLIT, training.seed, batch, start=training.step * batch)
    inputs = processor(
        text=[training_caption(scene) for scene in batch_of_scenes],
        images=[render(scene) for scene in batch_of_scenes],
        padding=True,
        return_tensors="pt",
    ).to(training.device)
    with training.autocast():
        logits = training.model(**inputs).logits_per_image.float()
    indices = torch.arange(batch, device=logits.device)
    loss = (nn.functional.cross_entropy(logits, indices) + nn.functional.cross_entropy(logits.T, indices)) / 2
    return {"loss": loss}


def save_clip(model: CLIPModel, processor: CLIPProcessor, folder: Path) -> None:
    """The folder that CLIPModel.from_pretrained and CLIPProcessor.from_pretrained load, weights in fp16."""
    dtype = model.dtype
    model.half().save_pretrained(folder)
    model.to(dtype)
    load_as_float32(folder)
    processor.save_pretrained(folder)
    save_tokenizer(processor.tokenizer, folder)


@torch.no_grad()
def retrieval(model: CLIPModel, processor: CLIPProcessor, batches: int = 8) -> dict[str, float]:
    """Share of pictures whose own caption is the nearest among 64, and of captions whose own picture is; and the mean
    cosine of a picture with its own caption and with another's."""
    scenes_to_find = distinct_scenes(RETRIEVAL_SPLIT, RETRIEVAL_SEED, RETRIEVAL_SIZE * batches)
    sums = torch.zeros(4)
    for first in range(0, len(scenes_to_find), RETRIEVAL_SIZE):
        chosen = scenes_to_find[first : first + RETRIEVAL_SIZE]
        captions, images = [scene.caption for scene in chosen], [render(scene) for scene in chosen]
        output = model(**processor(text=captions, images=images, padding=True, return_tensors="pt").to(model.device))
        cosines = output.image_embeds.float() @ output.text_embeds.float().T  # (pictures, captions)
        indices = torch.arange(len(cosines), device=cosines.device)
        wrong = cosines[~torch.eye(len(cosines), dtype=torch.bool, device=cosines.device)]
        hits = [(cosines.argmax(dim) == indices).float().mean() for dim in (1, 0)]
        sums += torch.stack([*hits, cosines.diagonal().mean(), wrong.mean()]).cpu()
    names = ("image_to_text", "text_to_image", "cosine_own", "cosine_other")
    return dict(zip(names, (sums / batches).tolist(), strict=True))


def main(args: Arguments) -> dict:
    """Trains, measures, writes the folder; returns what results.json holds."""
    args.output_dir.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(args.seed)
    processor = build_processor()
    model = build_clip(args, processor).to(args.device)
    plan = Plan(
        steps=args.max_train_steps,
        batch=args.train_batch_size,
        learning_rate=args.learning_rate,
        warmup=args.lr_warmup_steps,
        ema=0.998,
        save_steps=args.save_steps,
    )
    training = Training(model, plan, args.output_dir / "training_state.pt", args.seed, args.device, args.resume)
    training.run("clip", lambda now: contrastive_loss(now, processor), lambda: retrieval(model, processor, batches=1))

    training.finish()
    save_clip(model, processor, args.output_dir)
    shipped = CLIPModel.from_pretrained(args.output_dir, dtype=torch.float32)
    results = {
        "steps": training.step,
        "minutes": round(training.seconds / 60, 1),
        "seed": args.seed,
        "parameters": model.num_parameters(),
        "retrieval_among_64": retrieval(shipped, processor, args.retrieval_batches),
    }
    return write_results(args.output_dir, results, training=training.curve)


if __name__ == "__main__":
    print(json.dumps(main(parse(Arguments, __doc__)), indent=2))
