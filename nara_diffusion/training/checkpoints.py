"""The folder checkpoint-N: all that a run needs to continue after step N as if it had never stopped.

    checkpoint-N/adapter_config.json, adapter_model.safetensors   the adapter, as `formats` or another writer has it
                 optimizer.bin, scheduler.bin, scaler.pt          as accelerate writes them (scaler.pt with fp16); the
                                                                  optimizer by the engine, see `engines`
                 random_states_P.pkl                              of process P
                 checkpoint.json                                  step, time, processes, engine, arguments, size and
                                                                  SHA-256 of each file, digests of data and base model

The place in the data is the step alone: `stream.ShuffledStream` makes the order a function of (seed, position). Neither
the data nor the frozen base model are in a checkpoint, but it knows them again by their digests. A checkpoint is
written under another name and renamed when it is complete; older ones are deleted after that.
"""

from __future__ import annotations

import json
import logging
import re
import shutil
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import load

from nara_diffusion.utils.atomic_write import delete_folder, partial_name, put_in_place

from .arguments import differences
from .digests import digest_file
from .engines import engine_name, save_state, trained_state
from .options import given_arguments

logger = logging.getLogger(__name__)

MANIFEST = "checkpoint.json"
FORMAT = 2
Writer = Callable[[Any, Path, dict[str, Any]], None]
"""Writes an adapter's files: (the model without wrappers, the folder, the model's whole state dict)."""


# ---------------------------------------------------------------- writing


def save_checkpoint(
    accelerator: Accelerator, args: Any, folder: Path, step: int, digests: Mapping[str, str], write: Writer
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
    partial = partial_name(target)  # every process writes its random states into the same folder
    facts = {"format": FORMAT, "step": step, "arguments": given_arguments(args), "digests": dict(digests)}
    try:
        if accelerator.is_main_process:
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir(parents=True)
        accelerator.wait_for_everyone()
        for model in accelerator._models:
            state = trained_state(accelerator, model)
            if accelerator.is_main_process:
                write(accelerator.unwrap_model(model), partial, state)
        save_state(accelerator, partial)
        accelerator.wait_for_everyone()
        if accelerator.is_main_process:
            facts |= {"processes": accelerator.num_processes, "engine": engine_name(accelerator)}
            _write_manifest(partial, facts)
            put_in_place(partial, target)
            _delete_oldest(folder, args.checkpoints_total_limit, newest=target)
    except Exception as error:
        shutil.rmtree(partial, ignore_errors=True)
        raise OSError(
            f"{target} could not be written ({error}): is the disk full? {last_checkpoint(folder)}"
        ) from error
    accelerator.wait_for_everyone()
    return target


def save_adapter(accelerator: Accelerator, model: Any, folder: Path, write: Writer) -> None:
    """Write the adapter's files to `folder`. Every process calls it.

    Raises:
        OSError: they couldn't be written (a full disk, say); neither is there then, checkpoints are untouched.
    """
    state = trained_state(accelerator, model)
    if accelerator.is_main_process:
        partial = partial_name(folder / "adapter")
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        try:
            write(accelerator.unwrap_model(model), partial, state)
            for entry in partial.iterdir():
                if (folder / entry.name).is_dir():  # of the run that is resumed
                    shutil.rmtree(folder / entry.name)
                entry.replace(folder / entry.name)
        except Exception as error:
            raise OSError(
                f"the adapter could not be written to {folder} ({error}): is the disk full? {last_checkpoint(folder)}"
            ) from error
        finally:
            shutil.rmtree(partial, ignore_errors=True)
    accelerator.wait_for_everyone()


def _write_manifest(folder: Path, facts: Mapping[str, Any]) -> None:
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    files = {path.relative_to(folder).as_posix(): [path.stat().st_size, digest_file(path)] for path in paths}
    text = json.dumps({**facts, "written": time.time(), "files": files}, indent=2)
    (folder / MANIFEST).write_text(text + "\n", encoding="utf-8")


def _delete_oldest(folder: Path, limit: int | None, newest: Path) -> None:
    """Delete checkpoints beyond `limit`, the oldest first; `newest` stays."""
    others = [path for path in _in_order_of_writing(folder) if path != newest]
    for path in others[: len(others) if limit is not None else 0][: max(0, len(others) + 1 - (limit or 0))]:
        logger.info("deleting %s (--checkpoints_total_limit %d)", path, limit)
        delete_folder(path)


# ---------------------------------------------------------------- finding


def find_checkpoints(folder: Path) -> dict[int, Path]:
    """{step: folder} of the complete checkpoints in a run's folder."""
    matches = {path: re.fullmatch(r"checkpoint-(\d+)", path.name) for path in folder.glob("checkpoint-*")}
    return {int(match[1]): path for path, match in matches.items() if match and path.is_dir()}


def newest_checkpoint(folder: Path) -> Path | None:
    """The complete checkpoint in a run's folder that was written last, whatever its step: a run that went back writes
    steps anew that are below those of before."""
    return next(reversed(_in_order_of_writing(folder)), None)


def last_checkpoint(folder: Path) -> str:
    """A sentence that names the checkpoint in `folder` from which a run can be resumed."""
    newest = newest_checkpoint(folder)
    if newest is None:
        return "There is no checkpoint to continue from."
    return f"To continue, run the same command with --resume_from_checkpoint {newest}"


def resolve_checkpoint(resume_from_checkpoint: str, output_dir: Path | None) -> Path:
    """The folder that `--resume_from_checkpoint` means: `latest` is the newest in `output_dir`, and a bare
    `checkpoint-N` lies there or in the current folder.

    Raises:
        ValueError: there is no such checkpoint.
    """
    if resume_from_checkpoint == "latest":
        newest = newest_checkpoint(output_dir) if output_dir is not None else None
        if newest is None:
            where = output_dir if output_dir is not None else "outputs/"
            raise ValueError(f"--resume_from_checkpoint latest: {where} holds no checkpoint-N folder to continue from.")
        return newest
    folder = Path(resume_from_checkpoint)
    if len(folder.parts) == 1 and output_dir is not None and not (folder / MANIFEST).is_file():
        folder = output_dir / folder
    if not (folder / MANIFEST).is_file():
        present = ", ".join(path.name for _, path in sorted(find_checkpoints(folder.parent).items())) or "none"
        raise ValueError(
            f"--resume_from_checkpoint {folder} is no checkpoint: it has no {MANIFEST}. Name a checkpoint-N folder "
            f"({folder.parent} has {present}), or `latest` with the --output_dir of the run."
        )
    return folder


def _in_order_of_writing(folder: Path) -> list[Path]:
    """The complete checkpoints in a run's folder, the oldest first; those of version 0.1 before all others."""

    def written(path: Path) -> float:
        try:
            return read_manifest(path)["written"]
        except ValueError:
            return 0.0

    found = find_checkpoints(folder)
    return [found[step] for step in sorted(found, key=lambda step: (written(found[step]), step))]


# ---------------------------------------------------------------- checking


def read_manifest(checkpoint: Path) -> dict[str, Any]:
    """The content of checkpoint.json.

    Raises:
        ValueError: it is missing or corrupt, or of version 0.1.
    """
    path = checkpoint / MANIFEST
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
        if manifest.get("format") == FORMAT:
            names = ("step", "processes", "arguments", "files", "engine", "digests", "written")
            return {name: manifest[name] for name in names}
    except (OSError, ValueError, KeyError, AttributeError) as error:
        raise ValueError(f"{path} is missing or corrupt ({error}). Resume from another checkpoint.") from error
    raise ValueError(
        f"{checkpoint} is of version 0.1, whose runs this version doesn't continue: finish it with version 0.1, or "
        "start a new one, from its adapter by --init_adapter."
    )


def verify_checkpoint(checkpoint: Path, args: Any, accelerator: Accelerator) -> int:
    """Check that `checkpoint` is complete and was written by a run with these arguments. Returns its step.

    Raises:
        ValueError: naming the file that is missing or corrupt, the arguments that differ, or the engine.
    """
    manifest, engine = read_manifest(checkpoint), engine_name(accelerator)
    for name, (size, digest) in manifest["files"].items():
        file = checkpoint / name
        if not file.is_file():
            raise ValueError(f"{checkpoint} is incomplete: {name} is missing. Resume from another checkpoint.")
        if file.stat().st_size != size or digest_file(file) != digest:
            raise ValueError(f"{file} is corrupt: its content isn't what was saved. Resume from another checkpoint.")
    if changed := differences(args, manifest["arguments"], manifest["digests"]):
        raise ValueError(
            f"{checkpoint} belongs to a run of another configuration ({_listed(changed)}). Give the same arguments "
            f"(--config {checkpoint.parent / 'config.yaml'} holds them), or start a new run."
        )
    if manifest["engine"] != engine:
        raise ValueError(
            f"{checkpoint} was written under {manifest['engine']} and this run is under {engine}, which keep the "
            "optimizer in other ways: launch it as it was."
        )
    if manifest["processes"] != accelerator.num_processes:
        raise ValueError(
            f"{checkpoint} was written by {manifest['processes']} processes and this run has "
            f"{accelerator.num_processes}, which makes another global batch: launch as many."
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
    manifest = read_manifest(checkpoint)
    if manifest["digests"].get(what, digest) == digest:
        return
    changed = differences(args, manifest["arguments"], content=what)
    raise ValueError(
        f"{checkpoint} belongs to a run with {'other' if what.endswith('data') else 'another'} {what}"
        f"{f' ({_listed(changed)})' if changed else ''}: bring it back as it was, or start a new run."
    )


def check_random_states(checkpoint: Path, process: int) -> None:
    """Refuse to go on unless `load_state` has restored the generators: accelerate silently skips what it can't load.
    It restores Python's, NumPy's, PyTorch's and CUDA's in this order, so that the last one tells of all.

    Args:
        process: index of this process, which has a file of its own.

    Raises:
        ValueError: the file can't be read, or holds other states than the generators have now.
    """
    file = checkpoint / f"random_states_{process}.pkl"
    try:
        saved = load(file)
        pairs = [(saved["torch_manual_seed"], torch.get_rng_state())]
        if torch.cuda.is_available():
            pairs += zip(saved["torch_cuda_manual_seed"], torch.cuda.get_rng_state_all(), strict=True)
        restored = all(torch.equal(then.cpu(), now.cpu()) for then, now in pairs)
    except Exception as error:  # whatever unpickling raises
        raise ValueError(f"{file} can't be read ({error}): resume from another checkpoint.") from error
    if not restored:
        raise ValueError(
            f"{file} doesn't give the random states back, on other devices say, and dropout would be another one than "
            "in an uninterrupted run. Resume from another checkpoint."
        )


def _listed(changed: Mapping[str, tuple[Any, Any]]) -> str:
    return ", ".join(f"{name}: {old!r} there, {new!r} now" for name, (old, new) in changed.items())
