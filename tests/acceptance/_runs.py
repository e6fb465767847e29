"""Arguments of runs of a few steps: a small language model on some records, tiny image models on three pictures."""

from __future__ import annotations

import json
import shutil
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
from PIL import Image
from safetensors.torch import load_file, save_file

from nara_diffusion.dllm.text_arguments import Arguments
from nara_diffusion.dreambooth.image_arguments import DreamBoothArguments
from tests.acceptance._commands import ROOT
from tests.helpers.mixtures import LLADA2, write_checkpoint

TEXT = "adapter_model.safetensors"
IMAGES = "pytorch_nara_weights.safetensors"
ASSETS = ROOT / "examples" / "assets"
COMMON: dict[str, Any] = {
    "rank": 3,
    "lora_alpha": 5.0,
    "adapter_options": {"core_hidden_dims": [8, 7]},
    "max_train_steps": 6,
    "learning_rate": 1e-2,
    "core_learning_rate": 1e-3,
    "lr_scheduler": "cosine",
    "logging_steps": 1,
    "validation_steps": None,
    "checkpointing_steps": 2,
    "curve_points": 2,
}
"""Flags of six steps in either script."""


def records(count: int, seed: int) -> list[dict[str, str]]:
    """Words to be written in capitals, of unequal lengths."""
    random = np.random.default_rng(seed)
    texts = ["".join(chr(97 + code) for code in random.integers(0, 26, random.integers(2, 7))) for _ in range(count)]
    return [{"instruction": f"upper: {text}", "output": text.upper(), "answer": text.upper()} for text in texts]


def small_llada(folder: Path) -> Path:
    """Save two layers of the shipped LLaDA in `folder`/llada-tiny, cut to a width of 48, with its tokenizer."""
    shipped, target = ASSETS / "llada-tiny", folder / "llada-tiny"
    if not target.exists():
        config = json.loads((shipped / "config.json").read_text())
        shutil.copytree(shipped, target, ignore=shutil.ignore_patterns("model.safetensors", "*.png", "*.csv"))
        small = {"n_layers": 2, "d_model": 48, "mlp_hidden_size": 80}
        (target / "config.json").write_text(json.dumps(config | small))
        widths = {config["d_model"]: 48, config["mlp_hidden_size"]: 80}
        tensors = {
            name: tensor[tuple(slice(widths.get(size)) for size in tensor.shape)].contiguous()
            for name, tensor in load_file(shipped / "model.safetensors").items()
            if not name.startswith(("model.transformer.blocks.2.", "model.transformer.blocks.3."))
        }
        save_file(tensors, target / "model.safetensors", {"format": "pt"})
    return target


@cache
def record_files() -> TemporaryDirectory[str]:
    """The folder of records that all text runs read; `datasets` caches them, and their tokens, by path and time."""
    folder = TemporaryDirectory(prefix="records-")
    for name, count in (("train", 11), ("validation", 5), ("test", 4)):
        text = "".join(json.dumps(record) + "\n" for record in records(count, seed=count))
        Path(folder.name, f"{name}.jsonl").write_text(text)
    return folder


def text_flags(folder: Path) -> dict[str, Any]:
    """A small LLaDA with dropout, six steps of four records; the model is made in `folder`."""
    data = Path(record_files().name)
    return COMMON | {
        "pretrained_model_name_or_path": small_llada(folder),
        **{f"{name}_file": data / f"{name}.jsonl" for name in ("train", "validation", "test")},
        "lora_dropout": 0.2,
        "target_modules": ["q_proj", "v_proj", "down_proj"],
        "train_batch_size": 4,
        "max_length": 40,
        "eval_batch_size": 4,
        "gen_length": 8,
        "generation_steps": 2,
    }


def block_flags(folder: Path) -> dict[str, Any]:
    """A random LLaDA2 with blocks of 4 in the public format, and a task of words; files are made in `folder`.

    The answer is the last word of the question and two words that are always the same.
    """
    write_checkpoint(folder / "model", LLADA2 | {"block_length": 4, "moe_intermediate_size": 8})
    flags = text_flags(folder)
    random = np.random.default_rng(7)
    for name in ("train", "validation", "test"):
        rows = []
        for _ in range(24 if name == "train" else 5):
            words = [f"w{n}" for n in random.integers(6, 12, random.integers(2, 7))]
            answer = f"{words[-1]} w20 w21"
            rows.append(json.dumps({"instruction": " ".join(words), "output": answer, "answer": answer}) + "\n")
        flags[f"{name}_file"] = folder / f"{name}.jsonl"
        flags[f"{name}_file"].write_text("".join(rows))
    return flags | {
        "pretrained_model_name_or_path": folder / "model",
        "target_modules": ["all-linear"],
        "gen_length": 8,
        "generation_steps": None,
    }


def image_flags(folder: Path, pipe: Any) -> dict[str, Any]:
    """A tiny pipeline, six steps of two crops; the model and pictures are saved in `folder`."""
    pipe.save_pretrained(folder / "model")
    (folder / "pictures").mkdir()
    for number in range(3):
        blocks = np.random.default_rng(number).integers(0, 256, (4, 4, 3), dtype=np.uint8)
        picture = Image.fromarray(blocks).resize((20, 24), Image.Resampling.BICUBIC)
        picture.save(folder / "pictures" / f"{number}.png")
    return COMMON | {
        "pretrained_model_name_or_path": folder / "model",
        "instance_data_dir": folder / "pictures",
        "instance_prompt": "a photo of a toy",
        "resolution": 16,
        "random_flip": True,
        "train_batch_size": 2,
        "num_validation_images": 1,
        "num_inference_steps": 2,
        "similarity_model": None,
        "alignment_model": None,
    }


def text_arguments(folder: Path, **changes: Any) -> Arguments:
    """Those of `text_flags`, for a run in `folder`/run."""
    return _arguments(Arguments, text_flags(folder) | {"output_dir": folder / "run"} | changes)


def image_arguments(flags: dict[str, Any], output_dir: Path, **changes: Any) -> DreamBoothArguments:
    """Those of `image_flags`."""
    return _arguments(DreamBoothArguments, flags | {"output_dir": output_dir} | changes)


def _arguments(cls: type, values: dict[str, Any]) -> Any:
    return cls(**{name: str(v) if isinstance(v, Path) else v for name, v in values.items()})
