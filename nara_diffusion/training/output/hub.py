"""--push_to_hub: a run's folder as a model repository."""

from __future__ import annotations

from pathlib import Path

from huggingface_hub import HfApi

from .output_dir import CLAIM


def create_hub_repo(name: str) -> str:
    """Makes the repository (or finds it) before training, so that a missing login shows now; returns its full id."""
    return HfApi().create_repo(name, exist_ok=True).repo_id


def push_to_hub(repo_id: str, folder: Path) -> None:
    """Uploads `folder`, without its checkpoints, to the repository `repo_id`."""
    HfApi().upload_folder(
        repo_id=repo_id,
        folder_path=str(folder),
        commit_message="End of training",
        ignore_patterns=["checkpoint-*/**", ".partial-*", CLAIM],
    )
