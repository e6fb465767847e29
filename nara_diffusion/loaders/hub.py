"""Upload of an adapter to the Hub, with a model card that says how to load it."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import create_repo, upload_folder

from nara_diffusion.utils.atomic_write import atomic_write
from nara_diffusion.utils.hub_metadata import ADAPTER, front_matter

from .format import WEIGHTS_NAME, AdapterPart

CARD = "README.md"
OPTIONS = ("repo_id", "token", "private", "commit_message", "create_pr")


def check_hub_options(push_to_hub: bool, options: Mapping[str, Any]) -> None:
    """Raises ValueError for an option that isn't one of `OPTIONS`, or that is given without `push_to_hub`."""
    unknown = [name for name in options if name not in OPTIONS]
    if unknown:
        raise ValueError(
            f"save_nara_weights has no argument {unknown[0]!r}; for the Hub it takes {', '.join(OPTIONS)}."
        )
    if options and not push_to_hub:
        raise ValueError(f"{', '.join(options)} is for push_to_hub=True: pass that too.")


def push(
    pipe: Any, folder: Path, weight_name: str, parts: Mapping[str, AdapterPart], options: Mapping[str, Any]
) -> None:
    """Create the repository if there is none, and upload the adapter's file and model card, nothing else.

    Args:
        options: `repo_id` (by default the folder's name, in the user's namespace), `token`, `private`,
            `commit_message`, `create_pr`.
    """
    token = options.get("token")
    name = options.get("repo_id") or folder.resolve().name
    repository = create_repo(name, exist_ok=True, private=options.get("private"), token=token).repo_id
    if not (folder / CARD).exists():
        with atomic_write(folder / CARD) as partial:
            partial.write_text(card(pipe, repository, weight_name, parts), encoding="utf-8")
    message = options.get("commit_message") or "Upload NaRA weights"
    files = [weight_name, CARD]
    upload_folder(
        repo_id=repository,
        folder_path=str(folder),
        allow_patterns=files,
        token=token,
        commit_message=message,
        create_pr=options.get("create_pr", False),
    )


def card(pipe: Any, repository: str, weight_name: str, parts: Mapping[str, AdapterPart]) -> str:
    """The model card of an adapter: metadata, a description, and how to load it."""
    base = getattr(pipe.config, "_name_or_path", None) or None
    front = front_matter("diffusers", ["nara", "lora", "diffusers", "text-to-image"], base, ADAPTER)
    adapted = ", ".join(f"{name} (rank {part.config.r}, core {part.config.core_type})" for name, part in parts.items())
    named = "" if weight_name == WEIGHTS_NAME else f", weight_name={weight_name!r}"
    shown = base if base and not os.path.exists(base) else "the base model"
    return (
        f"---\n{front.strip()}\n---\n\n# {repository.rpartition('/')[2]}\n\n"
        f"A NaRA (noise-aware LoRA, [arXiv 2605.29716](https://arxiv.org/abs/2605.29716)) for `{shown}`: {adapted}.\n\n"
        "```python\nimport torch\n"
        f"from diffusers import {type(pipe).__name__}\n\nimport nara_diffusion\n\n"
        f"pipe = {type(pipe).__name__}.from_pretrained({shown!r}, dtype=torch.float16)\n"
        f"pipe.load_nara_weights({repository!r}{named})\n```\n"
    )
