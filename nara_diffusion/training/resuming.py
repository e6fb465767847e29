"""Check that a run can continue a checkpoint exactly: its engine, arguments and random states."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import load

from nara_diffusion.utils.wording import counted
from nara_flags.options import defaults_of
from nara_flags.parser import without_dicts
from nara_flags.training import TrainingArguments

from .checkpoints import read_manifest
from .engines import engine_name

logger = logging.getLogger(__name__)

_LENGTH = (
    "max_train_steps num_train_epochs logging_steps validation_steps checkpointing_steps "
    "checkpoints_total_limit report_to hub_model_id"
)
_EVALUATION = (
    "eval_batch_size generation_steps block_length extract test_file test_samples temperature "
    "cfg_scale top_p remasking confidence_threshold factor entropy_bound cache logits_eos_inf "
    "confidence_eos_eot_inf curve_points sample_batch_size validation_prompts "
    "num_validation_images num_inference_steps guidance_scale identifier similarity_model "
    "alignment_model"
)
_DATA = (
    "dataset_name train_file validation_file validation_samples max_train_samples "
    "dataset_config_name messages_field instruction_field input_field output_field text_field "
    "answer_field max_prompt_length caption_column instance_data_dir instance_prompt "
    "class_data_dir num_class_images validation_data_dir dataset_config trigger source_data_dir "
    "validation_source_dir"
)
_PLACES = "pretrained_model_name_or_path pretrained_vae_model_name_or_path init_adapter core_module"
MAY_CHANGE = frozenset(f"{_LENGTH} {_EVALUATION} {_DATA} {_PLACES}".split())
"""Arguments that may change when a run resumes.

The data and the base model are checked by their digests: changed data start again from the
beginning, and a changed base model is an error. All arguments that aren't in this set define what
is trained, or how.
"""
_BEFORE = {"group_by_length": False}
"""Options that earlier versions didn't have, where they acted otherwise than the present default."""


def check_same_run(checkpoint: Path, args: TrainingArguments, accelerator: Accelerator) -> None:
    """Raise ValueError if this run can't continue a checkpoint bit for bit.

    The message says which engine, number of processes or arguments differ.
    """
    manifest = read_manifest(checkpoint)
    engine, processes = engine_name(accelerator), accelerator.num_processes
    if manifest["engine"] != engine:
        raise ValueError(
            f"{checkpoint} was written under {manifest['engine']} and this run is under {engine}. They store the "
            "optimizer differently. Launch the run with the first."
        )
    if manifest["processes"] != processes:
        raise ValueError(
            f"{checkpoint} was written by {counted(manifest['processes'], 'process')}, but this run has {processes}. "
            "Each process has its own random states. Launch as many processes, or start a new run from its adapter "
            "with --init_adapter."
        )
    changed = changed_arguments(args, manifest["arguments"])
    refused = {name: values for name, values in changed.items() if name not in MAY_CHANGE}
    if refused:
        raise ValueError(
            f"{checkpoint} belongs to a run with other arguments ({describe_changes(refused)}). Give the same "
            f"arguments (--config {checkpoint.parent / 'config.yaml'} has them), or start a new run from its adapter "
            "with --init_adapter."
        )


def check_random_states(checkpoint: Path, process: int) -> None:
    """Raise ValueError unless `load_state` has restored the random generators of this process.

    accelerate silently skips states that it can't load. It restores the generators of Python,
    NumPy, PyTorch and CUDA in this order, so checking the last of them is enough.
    """
    file = checkpoint / f"random_states_{process}.pkl"
    try:
        saved = load(file)
        pairs = [(saved["torch_manual_seed"], torch.get_rng_state())]
        if torch.cuda.is_available():
            pairs += zip(
                saved["torch_cuda_manual_seed"], torch.cuda.get_rng_state_all(), strict=True
            )
    except Exception as error:  # unpickling may raise anything
        raise ValueError(
            f"{file} can't be read ({error}). Resume from another checkpoint."
        ) from error
    if not all(torch.equal(then.cpu(), now.cpu()) for then, now in pairs):
        raise ValueError(
            f"{file} doesn't restore the random states, so dropout would differ. Were they saved on other devices?"
        )


def warn_of_pickles(checkpoint: Path, engine: str) -> None:
    """Log a warning if resuming under `engine` (see `engine_name`) unpickles files."""
    if engine not in ("one process or DDP", "FSDP2 with FULL_STATE_DICT"):  # read with weights_only
        logger.warning(
            "%s: %s stores its state in pickles, and resuming runs the code in them. Resume only from checkpoints "
            "that you or people you trust have written.",
            checkpoint,
            engine,
        )


def changed_arguments(
    args: TrainingArguments, saved: Mapping[str, Any]
) -> dict[str, tuple[Any, Any]]:
    """Return {name: (saved value, current value)} of the arguments that differ from `saved`.

    `saved` may be the arguments of an earlier version. An option that it lacks had its present
    default, or its value in `_BEFORE`. An option that no longer exists counts as changed if it was
    on, since the resumed run would not have it. The arguments output_dir and resume_from_checkpoint
    are ignored.
    """
    now = vars(args)
    then = defaults_of(args) | _BEFORE | without_dicts(saved)
    gone = {name for name, value in then.items() if name not in now and value not in (None, False)}
    names = sorted((now.keys() | gone) - {"output_dir", "resume_from_checkpoint"})
    pairs = {name: (then.get(name), now.get(name)) for name in names}
    return {name: (old, new) for name, (old, new) in pairs.items() if old != new}


def describe_changes(changed: Mapping[str, tuple[Any, Any]]) -> str:
    """Return a description of `changed`, a result of `changed_arguments`."""
    return ", ".join(f"{name}: {old!r} there, {new!r} now" for name, (old, new) in changed.items())
