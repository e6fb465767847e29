"""The settings of each run of the paper's experiments, in a file beside it, which each later call compares.

OUTPUT_DIR/DOMAIN/METHOD/seed-N/settings.json is written before the first step of a run. Each later call compares

    all runs            model, pretrained_model_name_or_path, revision, dtype, evaluation_ and train_arguments
    runs of a domain    the configuration, and the content of the data files that exist
    runs of a method    method_arguments

The base model has only the settings that it depends on. Not compared are arguments that select runs (domains, methods,
seeds, MATH), arguments that change results by rounding only (batch_size, launch_arguments), the content of a model that
is given by name or folder, and the versions of installed packages.
"""

from __future__ import annotations

import hashlib
import json
import shlex
from collections.abc import Collection, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

from .launching import values_of
from .plan import BASE, EVALUATION, METHODS, TRAINING, Plan, Run, settings_of
from .shared import write_shared

FILE = "settings.json"
OF_THE_MODEL = ("pretrained_model_name_or_path", "revision")


def keep(plan: Plan, run: Run) -> None:
    """Write the settings of a run, unless it has begun."""
    folder = plan.folder(*run)
    if not _has_begun(folder):
        made_with = common_settings(plan, run[1]) | settings_of_run(plan, *run[:2])
        write_shared(folder / FILE, json.dumps(made_with, indent=2, ensure_ascii=False) + "\n")


def check(plan: Plan, domains: Collection[str], methods: Collection[str]) -> None:
    """Compare the settings of all runs in the output folder with those of `plan` for these domains and methods.

    Raises:
        ValueError: settings differ, with the name of a run for each; or a run has no settings file.
    """
    differing: dict[str, list[str]] = {}
    for domain, method, seed in plan.runs():
        folder = plan.folder(domain, method, seed)
        if not _has_begun(folder):
            continue
        now = common_settings(plan, method)
        if domain in domains:
            now |= settings_of_run(plan, domain, method)
            if method not in methods:
                now.pop("method_arguments", None)
        for difference in _differences(recorded(folder), now):
            differing.setdefault(difference, []).append(folder.relative_to(plan.output_dir).as_posix())
    if differing:
        told = "; ".join(f"{difference} ({_named(runs)})" for difference, runs in differing.items())
        raise ValueError(
            f"{plan.output_dir} holds runs that were made with other settings: {told}. Name another --output_dir, use "
            "those settings, or delete the folders of these runs to repeat them"
        )


def common_settings(plan: Plan, method: str) -> dict[str, Any]:
    """The settings that all domains and seeds share."""
    result = {
        "model": plan.model,
        "pretrained_model_name_or_path": plan.pretrained,
        "revision": values_of(plan.training).get("--revision"),
        "dtype": plan.dtype,
        "evaluation_arguments": separated(plan.evaluation),
    }
    return result if method == BASE else {**result, "train_arguments": separated(plan.training)}


def settings_of_run(plan: Plan, domain: str, method: str) -> dict[str, Any]:
    """The settings of a domain and of a method in it, with digests of the data files that exist."""
    configuration = settings_of(plan.config(domain))
    data = {path.relative_to(plan.data_dir).as_posix(): _digest(path) for path in plan.files(domain) if path.is_file()}
    if method == BASE:
        of_the_model = {name: value for name, value in configuration.items() if name in OF_THE_MODEL}
        return {"configuration": of_the_model, "data": data}
    own = (*METHODS.get(method, ()), *plan.methods.get(method, ()))
    return {"method_arguments": separated(own), "configuration": configuration, "data": data}


def recorded(folder: Path) -> dict[str, Any]:
    """The settings of the run in `folder`.

    Raises:
        ValueError: there is no settings file.
    """
    try:
        found = json.loads((folder / FILE).read_text(encoding="utf-8"))
    except (OSError, json.JSONDecodeError):
        found = None
    if not isinstance(found, dict):
        raise ValueError(
            f"{folder} holds a run, and no {FILE} with its settings: name another --output_dir, or delete the folder "
            "to repeat the run"
        )
    return found


def separated(words: Sequence[str]) -> list[str]:
    """Split --flag=VALUE into two words, so that both spellings of a flag are equal."""
    return [part for word in words for part in (word.split("=", 1) if word.startswith("--") else [word])]


def _has_begun(folder: Path) -> bool:
    """Whether `folder` has results or checkpoints that a later call would use."""
    patterns = (f"{TRAINING}/results.json", f"{TRAINING}/checkpoint-*", f"{EVALUATION}/*")
    return any(True for pattern in patterns for _ in folder.glob(pattern))


def _differences(then: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """The differences in words, without data files that don't exist now and the configuration of another model."""
    before, after = _flat(then), _flat(now)
    names = list(after)
    if "configuration" in now:
        names += [name for name in before if name.startswith("configuration ") and name not in after]
    if then.get("model") != now["model"]:
        names = [name for name in names if not name.startswith("configuration ")]
    return [
        f"{name} was {_shown(before.get(name))} and is now {_shown(after.get(name))}"
        for name in names
        if before.get(name) != after.get(name)
    ]


def _flat(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Flatten nested settings: {"configuration": {"rank": 8}} becomes {"configuration rank": 8}."""
    result: dict[str, Any] = {}
    for name, value in settings.items():
        result |= {f"{name} {key}": part for key, part in value.items()} if isinstance(value, dict) else {name: value}
    return result


def _shown(value: Any) -> str:
    if value is None or value == []:
        return "none"
    return f"'{shlex.join(map(str, value))}'" if isinstance(value, list) else str(value)


def _named(runs: Sequence[str]) -> str:
    return runs[0] if len(runs) == 1 else f"{runs[0]} and {len(runs) - 1} more"


def _digest(path: Path) -> str:
    status = path.stat()
    return _digest_of(path, status.st_size, status.st_mtime_ns)


@lru_cache
def _digest_of(path: Path, size: int, changed: int) -> str:
    """The digest of a file's content, cached by its size and its time of change."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(2**20):
            digest.update(block)
    return digest.hexdigest()[:16]
