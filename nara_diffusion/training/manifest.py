"""A checkpoint's manifest, checkpoint.json, and the digests that identify files, data and base."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import snapshot_download
from huggingface_hub.utils.sha import sha_fileobj

MANIFEST = "checkpoint.json"
FORMAT = 2
_FIELDS = {"step", "total_steps", "data_start", "unlogged", "batch", "processes", "engine"}
_FIELDS |= {"arguments", "digests", "written", "files"}


# ---------------------------------------------------------------- the manifest


def write_manifest(checkpoint: Path, manifest: Mapping[str, Any]) -> None:
    """Write checkpoint.json, with the digest of its own content as the last field."""
    content = json.loads(json.dumps(manifest))  # as JSON reads it: keys are strings
    content = {**content, "digest": _own_digest(content)}
    (checkpoint / MANIFEST).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def _own_digest(manifest: Mapping[str, Any]) -> str:
    return digest_texts([json.dumps({**manifest, "digest": None}, sort_keys=True)])


def read_manifest(checkpoint: Path) -> dict[str, Any]:
    """Return checkpoint.json's content. Without its digest, check only the names of its fields.

    Raises:
        ValueError: it is missing, corrupt, or of version 0.1.
    """
    path = checkpoint / MANIFEST
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
        version = manifest.get("format")
    except (OSError, ValueError, AttributeError) as error:
        raise ValueError(f"{path} is missing or corrupt ({error}).") from error
    if version != FORMAT:
        raise ValueError(
            f"{checkpoint} was written by version 0.1, and this version can't continue it: finish the run with 0.1, "
            "or start a new one from its adapter by --init_adapter."
        )
    if missing := sorted(_FIELDS - manifest.keys()):
        raise ValueError(f"{path} is corrupt: it lacks {', '.join(missing)}.")
    if manifest.get("digest", expected := _own_digest(manifest)) != expected:
        raise ValueError(f"{path} is corrupt: its content isn't what was saved.")
    return manifest


# ---------------------------------------------------------------- digests


def digest_texts(texts: Iterable[str]) -> str:
    """Return the SHA-256 of texts, in their order."""
    found = hashlib.sha256()
    for text in texts:
        content = text.encode("utf-8", errors="surrogatepass")
        found.update(len(content).to_bytes(8, "big") + content)
    return found.hexdigest()


def digest_file(path: Path) -> str:
    """Return the SHA-256 of a file."""
    with path.open("rb") as file:
        return sha_fileobj(file).hex()


def digest_base(folders: Mapping[str, Path], variant: str | None = None) -> dict[str, str]:
    """Return {part: digest} of a model's files: one for all weights, one per configuration.

    Args:
        folders: {component: its folder}; the name is empty if the model has no components.
        variant: the variant of the weights to read, such as fp16, if there are some.
    """
    weights = [
        (name, file) for name, folder in folders.items() for file in _weight_files(folder, variant)
    ]
    found = {
        "base model": digest_texts(
            text for name, file in weights for text in (name, digest_file(file))
        )
    }
    for name, folder in folders.items():
        for file in (folder / config for config in ("config.json", "scheduler_config.json")):
            if file.is_file():
                found[f"base model configuration {Path(name, file.name).as_posix()}"] = digest_file(
                    file
                )
    return found


def _weight_files(folder: Path, variant: str | None) -> list[Path]:
    files = sorted(folder.glob("*.safetensors")) or sorted(folder.glob("*.bin"))
    named = [file for file in files if variant and f".{variant}" in file.stem]
    return named or [file for file in files if "." not in file.stem]


def local_folder(name: str, *, revision: str | None = None) -> Path:
    """Return the folder of a loaded model: `name`, or its local copy from the Hub."""
    return Path(
        name
        if Path(name).is_dir()
        else snapshot_download(name, revision=revision, local_files_only=True)
    )
