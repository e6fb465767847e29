"""The folder checkpoint-N: all that a run needs to continue after step N as if it had never stopped.

    checkpoint-N/adapter_config.json, adapter_model.safetensors   the adapter, as `formats` or another writer has it
                 optimizer.bin, scheduler.bin, scaler.pt          as accelerate writes them (scaler.pt with fp16); the
                                                                  optimizer by the engine, see `engine_state`
                 random_states_P.pkl                              of process P
                 checkpoint.json                                  step, time, processes, engine, arguments, SHA-256 of
                                                                  each file above, digests of data and base model

The place in the data is the step alone: `stream.ShuffledStream` makes the order a function of (seed, position). Neither
the data nor the frozen base model are in a checkpoint, but it knows them again by their digests (`digests`). A
checkpoint is written under another name and renamed when it is complete, and a file that has changed since is named
when it is loaded.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import re
import shutil
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from accelerate import Accelerator

from nara_diffusion.training.arguments.checks import config_differences, content_differences
from nara_diffusion.training.engine.state import engine_name, save_state, trained_state
from nara_diffusion.training.formats import AdapterWriter, write_adapter, write_checkpoint
from nara_diffusion.training.output.output_dir import write_json
from nara_diffusion.utils.atomic_write import atomic_write_folder, delete_folder, partial_name, put_in_place

from .digests import digest_file

logger = logging.getLogger(__name__)

MANIFEST = "checkpoint.json"


def save_checkpoint(
    accelerator: Accelerator,
    args: Any,
    folder: Path,
    step: int,
    digests: Mapping[str, str] | None = None,
    write: AdapterWriter = write_checkpoint,
) -> Path:
    """Write `folder/checkpoint-{step}`. Every process calls it. Of the other checkpoints, those written first are
    deleted beyond `--checkpoints_total_limit`.

    Args:
        digests: {what the run rests on: its digest}, for `check_same_content`.
        write: writes the adapter's files.

    Raises:
        OSError: it couldn't be written (a full disk, say); nothing of it is left, earlier checkpoints are untouched.
    """
    target = folder / f"checkpoint-{step}"
    try:
        facts = {"step": step, "arguments": dataclasses.asdict(args), "digests": dict(digests or {})}
        _write(accelerator, target, facts, write)
    except Exception as error:
        raise OSError(
            f"{target} could not be written ({error}): is the disk full or read-only? {last_checkpoint(folder)}"
        ) from error
    if accelerator.is_main_process and args.checkpoints_total_limit is not None:
        _delete_oldest(folder, args.checkpoints_total_limit, newest=target)
    accelerator.wait_for_everyone()
    return target


def find_checkpoints(folder: Path) -> dict[int, Path]:
    """{step: folder} of the complete checkpoints in a run's folder."""
    matches = {path: re.fullmatch(r"checkpoint-(\d+)", path.name) for path in folder.glob("checkpoint-*")}
    return {int(match[1]): path for path, match in matches.items() if match and path.is_dir()}


def newest_checkpoint(folder: Path) -> Path | None:
    """The complete checkpoint in a run's folder that was written last, whatever its step: a run that went back writes
    steps anew that are below those of before."""
    return next(reversed(_in_order_of_writing(folder)), None)


def locate_checkpoint(resume_from_checkpoint: str | None, output_dir: Path | None) -> str | None:
    """What `--resume_from_checkpoint` says, with the folder of the run before a bare `checkpoint-N`, unless that lies
    in the current folder."""
    if resume_from_checkpoint in (None, "latest") or output_dir is None:
        return resume_from_checkpoint
    folder = Path(resume_from_checkpoint)
    if len(folder.parts) > 1 or (folder / MANIFEST).is_file():
        return resume_from_checkpoint
    return str(output_dir / folder)


def resolve_checkpoint(resume_from_checkpoint: str, output_dir: Path | None) -> Path:
    """The folder that `--resume_from_checkpoint` means; `latest` is the newest one in `output_dir`.

    Raises:
        ValueError: there is no such checkpoint; or, for `latest`, one doesn't say when it was written.
    """
    if resume_from_checkpoint != "latest":
        folder = Path(resume_from_checkpoint)
        if not (folder / MANIFEST).is_file():
            present = ", ".join(path.name for _, path in sorted(find_checkpoints(folder.parent).items())) or "none"
            raise ValueError(
                f"--resume_from_checkpoint {folder} is no checkpoint: it has no {MANIFEST}. Name a checkpoint-N "
                f"folder ({folder.parent} has {present}), or `latest` with the --output_dir of the run."
            )
        return folder
    newest = newest_checkpoint(output_dir) if output_dir is not None else None
    if newest is None:
        where = output_dir if output_dir is not None else "outputs/"
        raise ValueError(f"--resume_from_checkpoint latest: {where} holds no checkpoint-N folder to continue from.")
    for checkpoint in find_checkpoints(newest.parent).values():
        _read_manifest(checkpoint)
    return newest


def last_checkpoint(folder: Path) -> str:
    """A sentence that names the checkpoint in `folder` from which a run can be resumed."""
    newest = newest_checkpoint(folder)
    if newest is None:
        return "There is no checkpoint to continue from."
    return (
        f"The last whole checkpoint is {newest}: to continue, run the same command with "
        f"--resume_from_checkpoint {newest}"
    )


def verify_checkpoint(checkpoint: Path, args: Any, processes: int, engine: str) -> int:
    """Check that `checkpoint` is complete and was written by a run with these arguments. Returns its step.

    Args:
        engine: see `engine_name`.

    Raises:
        ValueError: naming the file that is missing or corrupt, the arguments that differ, or the engine.
    """
    manifest = _read_manifest(checkpoint)
    for name, digest in manifest["files"].items():
        file = checkpoint / name
        if not file.is_file():
            raise ValueError(f"{checkpoint} is incomplete: {name} is missing. Resume from another checkpoint.")
        if digest_file(file) != digest:
            raise ValueError(f"{file} is corrupt: its content isn't what was saved. Resume from another checkpoint.")
    differences = config_differences(args, manifest["arguments"], manifest["digests"])
    if differences:
        raise ValueError(
            f"{checkpoint} belongs to a run of another configuration ({_listed(differences)}). Give the same arguments "
            f"(--config {checkpoint.parent / 'config.yaml'} holds them), or start a new run."
        )
    if manifest["engine"] != engine:
        raise ValueError(
            f"{checkpoint} was written under {manifest['engine']} and this run is under {engine}, which keep the "
            "optimizer in other ways: launch it as it was."
        )
    if manifest["processes"] != processes:
        raise ValueError(
            f"{checkpoint} was written by {manifest['processes']} processes and this run has {processes}, which makes "
            "another global batch: launch as many."
        )
    return manifest["step"]


def check_same_content(checkpoint: Path, args: Any, what: str, digest: str) -> None:
    """Refuse to resume with other data, in which the step is another place, or on another base model.

    Args:
        what: the key in the checkpoint's digests.
        digest: the digest of the current content.

    Raises:
        ValueError: `checkpoint` has another digest.
    """
    manifest = _read_manifest(checkpoint)
    if manifest["digests"].get(what, digest) == digest:
        return
    differences = content_differences(args, manifest["arguments"], what)
    names = f" ({_listed(differences)})" if differences else ""
    raise ValueError(
        f"{checkpoint} belongs to a run with {'other' if what.endswith('data') else 'another'} {what}{names}: bring it "
        "back as it was, or start a new run."
    )


def _listed(differences: Mapping[str, tuple[Any, Any]]) -> str:
    return ", ".join(f"{name}: {old!r} there, {new!r} now" for name, (old, new) in differences.items())


def save_adapter(accelerator: Accelerator, model: Any, folder: Path, write: AdapterWriter = write_adapter) -> None:
    """Write the adapter's files to `folder`. Every process calls it.

    Raises:
        OSError: they couldn't be written (a full disk, say); neither is there then, checkpoints are untouched.
    """
    state = trained_state(accelerator, model)
    if accelerator.is_main_process:
        partial = partial_name(folder / "adapter")
        try:
            write(accelerator.unwrap_model(model), partial, state)
            for entry in partial.iterdir():
                if (folder / entry.name).is_dir():  # of the run that is resumed
                    shutil.rmtree(folder / entry.name)
                entry.replace(folder / entry.name)
        except Exception as error:
            raise OSError(
                f"the adapter could not be written to {folder} ({error}): is the disk full or read-only? "
                f"{last_checkpoint(folder)}"
            ) from error
        finally:
            shutil.rmtree(partial, ignore_errors=True)
    accelerator.wait_for_everyone()


def _write(accelerator: Accelerator, target: Path, facts: dict[str, Any], write: AdapterWriter) -> None:
    if accelerator.num_processes == 1:
        with atomic_write_folder(target) as partial:
            _write_states(accelerator, partial, write)
            _write_manifest(accelerator, partial, facts)
        return
    partial = partial_name(target)  # every process writes its random states into the same folder
    if accelerator.is_main_process:
        shutil.rmtree(partial, ignore_errors=True)
    accelerator.wait_for_everyone()
    _write_states(accelerator, partial, write)
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        _write_manifest(accelerator, partial, facts)
        put_in_place(partial, target)
    accelerator.wait_for_everyone()


def _write_states(accelerator: Accelerator, folder: Path, write: AdapterWriter) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for model in accelerator._models:
        state = trained_state(accelerator, model)
        if accelerator.is_main_process:
            write(accelerator.unwrap_model(model), folder, state)
    save_state(accelerator, folder)


def _write_manifest(accelerator: Accelerator, folder: Path, facts: dict[str, Any]) -> None:
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    facts = {
        **facts,
        "written": time.time(),
        "processes": accelerator.num_processes,
        "engine": engine_name(accelerator),
        "files": {path.relative_to(folder).as_posix(): digest_file(path) for path in paths},
    }
    write_json(folder / MANIFEST, facts)


def _read_manifest(checkpoint: Path) -> dict[str, Any]:
    path = checkpoint / MANIFEST
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
        found = {name: manifest[name] for name in ("step", "processes", "arguments", "files")}
        if "engine" in manifest:
            return found | {name: manifest[name] for name in ("engine", "digests", "written")}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is missing or corrupt ({error}). Resume from another checkpoint.") from error
    raise ValueError(
        f"{checkpoint} is of an earlier version, which didn't note the engine or the files of the base model: finish "
        "the run with that version, or start a new one."
    )


def _delete_oldest(folder: Path, limit: int, newest: Path) -> None:
    """Delete checkpoints beyond `limit`, the oldest first; `newest` stays."""
    others = [path for path in _in_order_of_writing(folder) if path != newest]
    for path in others[: max(0, len(others) + 1 - limit)]:
        logger.info("deleting %s (--checkpoints_total_limit %d)", path, limit)
        delete_folder(path)


def _in_order_of_writing(folder: Path) -> list[Path]:
    """The complete checkpoints in a run's folder, the oldest first; by their steps where they don't say."""
    found = find_checkpoints(folder)
    return [found[step] for step in sorted(found, key=lambda step: (_written(found[step]), step))]


def _written(checkpoint: Path) -> float:
    """The time at which the checkpoint was written, in seconds since 1970; 0 if unknown."""
    try:
        return _read_manifest(checkpoint)["written"]
    except ValueError:
        return 0.0
