"""`--push_to_hub`: upload the folder of a run to a model repository."""

from __future__ import annotations

from pathlib import Path

from huggingface_hub import HfApi

from .output_dir import CLAIM


def create_hub_repo(name: str) -> str:
    """Create the repository, unless it exists, before training: a missing login shows now. Returns its full id."""
    return HfApi().create_repo(name, exist_ok=True).repo_id


def push_to_hub(repo_id: str, folder: Path) -> None:
    """Upload `folder`, without its checkpoints, to the repository `repo_id`."""
    HfApi().upload_folder(
        repo_id=repo_id,
        folder_path=str(folder),
        commit_message="End of training",
        ignore_patterns=["checkpoint-*/**", ".partial-*", CLAIM],
    )
