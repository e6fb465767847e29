"""Digests of a run's data and of its base model, by which a checkpoint recognises them."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from itertools import product
from pathlib import Path

from huggingface_hub import snapshot_download
from huggingface_hub.utils.sha import sha_fileobj

_WEIGHTS = ("diffusion_pytorch_model", "model", "pytorch_model")  # of Diffusers and transformers
_CONFIGURATIONS = ("config.json", "scheduler_config.json")


def digest_texts(texts: Iterable[str]) -> str:
    """SHA-256 of texts in their order."""
    found = hashlib.sha256()
    for text in texts:
        content = text.encode("utf-8", errors="surrogatepass")
        found.update(len(content).to_bytes(8, "big") + content)
    return found.hexdigest()


def digest_file(path: Path) -> str:
    """SHA-256 of a file."""
    with path.open("rb") as file:
        return sha_fileobj(file).hex()


def digest_base(folders: Mapping[str, Path], variant: str | None = None) -> dict[str, str]:
    """{what: its digest} of a model's files, which don't depend on the engine: of all weights, of each configuration.

    Args:
        folders: {component: its folder}; the component is "" where the model has no others.
        variant: of the weight files, such as fp16.
    """
    weights = [(name, file) for name, folder in folders.items() for file in _weight_files(folder, variant)]
    found = {"base model": digest_texts(text for name, file in weights for text in (name, digest_file(file)))}
    for name, folder in folders.items():
        for file in (folder / config for config in _CONFIGURATIONS):
            if file.is_file():
                found[f"base model configuration {Path(name, file.name).as_posix()}"] = digest_file(file)
    return found


def _weight_files(folder: Path, variant: str | None) -> list[Path]:
    """The files that `from_pretrained` reads weights from: those of `variant`, else those of none."""
    for part, ending, stem in product((f".{variant}" if variant else "", ""), ("safetensors", "bin"), _WEIGHTS):
        names = (f"{stem}{part}", f"{stem}{part}-*-of-*", f"{stem}-*-of-*{part}")
        if files := {file for name in names for file in folder.glob(f"{name}.{ending}")}:
            return sorted(files)
    return []


def local_folder(name: str, *, revision: str | None = None) -> Path:
    """The folder of a model that `from_pretrained` has loaded: `name` itself, or the Hub's copy on this machine."""
    return Path(name if Path(name).is_dir() else snapshot_download(name, revision=revision, local_files_only=True))
