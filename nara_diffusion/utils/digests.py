"""Digests that identify texts, files and base models."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from huggingface_hub.utils.sha import sha_fileobj
from torch import Tensor


def digest_texts(texts: Iterable[str]) -> str:
    """Return the SHA-256 of `texts` in the given order."""
    digest = hashlib.sha256()
    for text in texts:
        content = text.encode("utf-8", errors="surrogatepass")
        digest.update(len(content).to_bytes(8, "big") + content)
    return digest.hexdigest()


def digest_file(path: Path) -> str:
    """Return the SHA-256 of a file."""
    with path.open("rb") as file:
        return sha_fileobj(file).hex()


def digest_tensors(tensors: Mapping[str, Tensor]) -> str:
    """Return the SHA-256 of tensors with their names, dtypes and shapes, in any order."""
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def digest_base(folders: Mapping[str, Path], variant: str | None = None) -> dict[str, str]:
    """Return {part: digest} for a model's files, one for all weights and one per configuration.

    Args:
        folders: {component: its folder}. The name is empty if the model has no components.
        variant: the variant of the weights to read, such as fp16, or None.
    """
    weights: list[str] = []
    configurations = {}
    for name, folder in folders.items():
        files = sorted(folder.glob("*.safetensors")) or sorted(folder.glob("*.bin"))
        of_variant = [file for file in files if variant and f".{variant}" in file.stem]
        for file in of_variant or [file for file in files if "." not in file.stem]:
            weights += [name, digest_file(file)]
        for config in ("config.json", "scheduler_config.json"):
            if (folder / config).is_file():
                label = f"base model configuration {Path(name, config).as_posix()}"
                configurations[label] = digest_file(folder / config)
    return {"base model": digest_texts(weights), **configurations}
