"""Prepare a run for publication: remove folder names from its files, and upload it to the Hub.

The model card, results.json and the uploaded config.yaml may be published, so paths on this machine
are cut to their last part. The run's own config.yaml keeps the full paths, which are needed to
resume the run.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi

from nara_flags.training import TrainingArguments

from .run import Run
from .run_folder import CONFIG, LOCK, as_yaml


def without_folders(text: str, args: TrainingArguments) -> str:
    """Return `text` for publication, with the arguments' absolute paths cut to their last part."""
    values = [str(value) for value in vars(args).values() if isinstance(value, (str, Path))]
    places = [value for value in values if value.startswith(("/", "~"))]
    for place in sorted(places, key=len, reverse=True):
        path = Path(place)
        for form in (place, str(path), os.path.expanduser(path)):
            text = text.replace(form, path.name or place)
    return text


def public_values(values: Mapping[str, Any], args: TrainingArguments) -> dict[str, Any]:
    """Return `values` for publication, after applying `without_folders` to all texts."""
    return {
        name: without_folders(value, args) if isinstance(value, str) else value
        for name, value in values.items()
    }


def upload(run: Run) -> None:
    """Upload the run's folder, without checkpoints and trajectories, to `--hub_model_id` if set."""
    if run.hub_id is None:
        return
    HfApi().upload_folder(
        repo_id=run.hub_id,
        folder_path=str(run.folder),
        commit_message="End of training",
        ignore_patterns=["checkpoint-*/**", "trajectories/**", ".partial-*", LOCK, CONFIG],
    )
    content = as_yaml(public_values(vars(run.args), run.args)).encode()
    HfApi().upload_file(repo_id=run.hub_id, path_in_repo=CONFIG, path_or_fileobj=content)
