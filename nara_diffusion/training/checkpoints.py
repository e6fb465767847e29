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

import hashlib
import json
import logging
import random
import re
import shutil
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import load
from huggingface_hub import snapshot_download

from nara_diffusion.utils.atomic_write import delete_folder, partial_name, put_in_place

from .arguments import differences
from .engines import engine_name, save_state, trained_state
from .parser import given_arguments

logger = logging.getLogger(__name__)

MANIFEST = "checkpoint.json"
FORMAT = 2
Writer = Callable[[Any, Path, dict[str, Any]], None]
"""Writes an adapter's files: (the model without wrappers, the folder, the model's whole state dict)."""

_WEIGHTS = ("diffusion_pytorch_model", "model", "pytorch_model")  # of Diffusers and transformers
_CONFIGURATIONS = ("config.json", "scheduler_config.json")


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
    """Compare the generators with the states that `load_state` should have restored: accelerate silently skips those
    that it can't load.

    Args:
        process: index of this process, which has a file of its own.

    Raises:
        ValueError: the file can't be read, or holds other states than the generators have now.
    """
    file = checkpoint / f"random_states_{process}.pkl"
    states: dict[str, Any] = {"random_state": random.getstate(), "torch_manual_seed": torch.get_rng_state().tolist()}
    states["numpy_random_seed"] = [np.asarray(part).tolist() for part in np.random.get_state()]  # noqa: NPY002
    if torch.cuda.is_available():
        states["torch_cuda_manual_seed"] = [state.tolist() for state in torch.cuda.get_rng_state_all()]
    try:
        saved = load(file)
        saved["torch_manual_seed"] = saved["torch_manual_seed"].tolist()
        saved["numpy_random_seed"] = [np.asarray(part).tolist() for part in saved["numpy_random_seed"]]
        if torch.cuda.is_available():
            saved["torch_cuda_manual_seed"] = [state.tolist() for state in saved["torch_cuda_manual_seed"]]
        wrong = [name for name, state in states.items() if saved[name] != state]
    except Exception as error:  # whatever unpickling raises
        raise ValueError(f"{file} can't be read ({error}): resume from another checkpoint.") from error
    if wrong:
        raise ValueError(
            f"{file} doesn't give the random states back ({', '.join(wrong)}, on other devices say), and dropout would "
            "be another one than in an uninterrupted run. Resume from another checkpoint."
        )


def _listed(changed: Mapping[str, tuple[Any, Any]]) -> str:
    return ", ".join(f"{name}: {old!r} there, {new!r} now" for name, (old, new) in changed.items())


# ---------------------------------------------------------------- digests


def digest_texts(texts: Iterable[str]) -> str:
    """SHA-256 of texts in their order."""
    found = hashlib.sha256()
    for text in texts:
        content = text.encode("utf-8", errors="surrogatepass")
        found.update(len(content).to_bytes(8, "big") + content)
    return found.hexdigest()


def digest_file(path: Path) -> str:
    """SHA-256 of a file."""
    found = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            found.update(block)
    return found.hexdigest()


def digest_base(folders: Mapping[str, Path], variant: str | None = None) -> dict[str, str]:
    """{what: its digest} of a model's files: one digest of all weights, and one of each configuration.

    The files are the same whatever the engine, under which a process may hold a part of each tensor, or none.

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
    for part in dict.fromkeys((f".{variant}" if variant else "", "")):
        for ending in ("safetensors", "bin"):
            for stem in _WEIGHTS:
                files = {*folder.glob(f"{stem}{part}.{ending}"), *folder.glob(f"{stem}{part}-*-of-*.{ending}")}
                files |= set(folder.glob(f"{stem}-*-of-*{part}.{ending}"))
                if files:
                    return sorted(files)
    return []


def local_folder(name: str, *, revision: str | None = None, cache_dir: str | None = None) -> Path:
    """The folder of a model that `from_pretrained` has loaded: `name` itself, or the Hub's copy on this machine."""
    if Path(name).is_dir():
        return Path(name)
    return Path(snapshot_download(name, revision=revision, cache_dir=cache_dir, local_files_only=True))
