"""One training run: its accelerator, current step, losses and log. `run_folder` has its folder."""

from __future__ import annotations

import json
import logging
import math
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

import torch
from accelerate import Accelerator
from accelerate.tracking import get_available_trackers
from accelerate.utils import broadcast_object_list, set_seed
from huggingface_hub import HfApi

from nara_diffusion.utils.files import atomic_write, digest_base, digest_texts
from nara_flags.training import TrainingArguments

from .arguments import method_of
from .checkpoints import Writer, load_state, read_manifest, save_checkpoint
from .engines import engine_name, start_accelerator
from .run_folder import (
    CONFIG,
    METRICS,
    as_yaml,
    changed_arguments,
    check_random_states,
    claimed_folder,
    describe_changes,
    drop_later_steps,
    warn_of_pickles,
)

logger = logging.getLogger(__name__)

Args = TypeVar("Args", bound=TrainingArguments, covariant=True)

DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16}
"""{mixed precision: dtype}. The dtype is float32 for all other values."""


@dataclass
class Run(Generic[Args]):
    """The state of a run, created by `start_run`.

    Attributes:
        accelerator: accelerate's engine.
        args: the arguments as given.
        name: the name in numbered output folders and in trackers' projects.
        write: the function that writes the adapter's files into a checkpoint.
        checkpoint: the folder that the run continues from, or None.
        folder: the folder that the run writes to.
        resumed: the manifest of `checkpoint`; empty without a checkpoint.
        started: the time of the start, by `time.perf_counter`, in seconds.
        step: the number of completed optimizer steps.
        total_steps: the number of all optimizer steps, set by `plan`.
        data_start: the step where the current training data began; 0 unless the data changed.
        unlogged: the sum and the number of the samples' losses since the last log, then the sums
            of further figures.
        hub_id: the repository to upload to; None on all processes but the main one.
        digests: {content: digest}, set by `record_data_digest` and `record_base_digests`.
    """

    accelerator: Accelerator
    args: Args
    name: str
    write: Writer
    checkpoint: Path | None
    folder: Path
    resumed: Mapping[str, Any]

    def __post_init__(self) -> None:
        self.started, self.total_steps = time.perf_counter(), 0
        self.hub_id: str | None = None
        self.digests: dict[str, str] = {}
        self.step, self.data_start = self.resumed.get("step", 0), self.resumed.get("data_start", 0)
        self.unlogged: list[float] = list(self.resumed.get("unlogged", (0.0, 0)))

    @property
    def is_main(self) -> bool:
        """True on the process that writes and prints."""
        return self.accelerator.is_main_process

    @property
    def hardware(self) -> str:
        """The hardware of the run, in words."""
        device, processes = self.accelerator.device, self.accelerator.num_processes
        if device.type == "cuda":
            return f"{processes} x {torch.cuda.get_device_name(device)}"
        return f"{processes} x {device.type}, {torch.get_num_threads()} threads"

    @property
    def global_batch(self) -> int:
        """The number of samples in one optimizer step, over all processes and forwards."""
        accelerator = self.accelerator
        forwards = accelerator.gradient_accumulation_steps * accelerator.num_processes
        return self.args.train_batch_size * forwards

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the frozen weights, which follows the mixed precision of the forward."""
        return DTYPES.get(self.accelerator.mixed_precision, torch.float32)

    @property
    def weights_dtype(self) -> torch.dtype:
        """The dtype to load the model in. Training all weights needs float32 for small updates."""
        return torch.float32 if method_of(self.args).family == "full" else self.dtype

    def record_data_digest(self, content: str, texts: Iterable[str]) -> None:
        """Record the digest of "training data" or "validation data". Call this before `plan`.

        A resumed run warns if the data have changed. Changed training data start again from the
        beginning.
        """
        self.digests[content] = digest_texts(texts)
        if self.resumed.get("digests", self.digests).get(content) == self.digests[content]:
            return
        consequence = ""
        if content == "training data":
            self.data_start = self.step
            consequence = f", so their order starts again at step {self.step}"
        if self.is_main:
            logger.warning("%s was written with other %s%s", self.checkpoint, content, consequence)

    def record_base_digests(self, folders: Mapping[str, Path], variant: str | None = None) -> None:
        """Record the digests of the base model (see `digest_base`) for the run's checkpoints.

        Raises:
            ValueError: the run resumes a checkpoint of another base model.
        """
        digests = [digest_base(folders, variant) if self.is_main else {}]
        self.digests |= broadcast_object_list(digests)[0]
        saved = self.resumed.get("digests", self.digests)
        for content, digest in self.digests.items():
            if content.startswith("base model") and saved.get(content, digest) != digest:
                raise ValueError(
                    f"{self.checkpoint} belongs to a run with another {content}. Restore that one, or start a "
                    "new run."
                )

    def plan(self, samples: int) -> int:
        """Set and return the number of all optimizer steps of the run, completed steps included.

        The number is `--max_train_steps`, or the steps of `--num_train_epochs` (by default 1)
        passes over `samples`.

        Raises:
            ValueError: the checkpoint is beyond this number.
        """
        if self.args.max_train_steps is not None:
            self.total_steps = self.args.max_train_steps
        else:
            epochs = self.args.num_train_epochs or 1
            self.total_steps = self.data_start + max(
                1, math.ceil(epochs * samples / self.global_batch)
            )
        if self.total_steps < self.step:
            raise ValueError(
                f"The run ends at step {self.total_steps}, but {self.checkpoint} is past it. Give a larger "
                "--max_train_steps or --num_train_epochs, or resume an earlier checkpoint."
            )
        return self.total_steps

    @property
    def validation_steps(self) -> int | None:
        """The number of optimizer steps between two validations; None means never."""
        every = self.args.validation_steps
        if every is None:
            return None
        return math.ceil(every * self.total_steps) if every < 1 else int(every)

    def positions_left(self) -> range:
        """Return the positions in the stream of training data that are still to be trained on."""
        return range(
            self.global_batch * (self.step - self.data_start),
            self.global_batch * (self.total_steps - self.data_start),
        )

    def open(self, facts: Mapping[str, str]) -> None:
        """Write the configuration into the run's folder, start the trackers, and log `facts`.

        Call this after all checks of the data and the model.
        """
        settings = vars(self.args)
        if self.is_main:
            with atomic_write(self.folder / CONFIG) as partial:
                partial.write_text(as_yaml(settings | {"output_dir": str(self.folder)}), "utf-8")
            drop_later_steps(self.folder / METRICS, self.step)
        self.accelerator.project_configuration.logging_dir = str(self.folder)
        if self.args.report_to:
            texts = {name: str(value) for name, value in settings.items()}
            self.accelerator.init_trackers(self.name, texts)
        for label, value in facts.items():  # `run_command` hides this on other processes
            logger.info("%s: %s", label, value)
        logger.info("output folder: %s", self.folder)

    def restore(self) -> None:
        """Restore optimizer, schedule and random states from the run's checkpoint, if there is one.

        Call this after `accelerator.prepare` has received these objects.
        """
        if self.checkpoint is None:
            return
        if self.is_main:
            warn_of_pickles(self.checkpoint, engine_name(self.accelerator))
        load_state(self.accelerator, self.checkpoint)
        check_random_states(self.checkpoint, self.accelerator.process_index)
        logger.info("continues from %s", self.checkpoint)
        if changed := changed_arguments(self.args, self.resumed["arguments"]):
            logger.info("changed arguments: %s", describe_changes(changed))
        old_steps = self.resumed["total_steps"]
        if old_steps != self.total_steps:
            logger.info("the schedule now has %d steps instead of %d", self.total_steps, old_steps)

    def log(self, values: Mapping[str, float]) -> None:
        """Write this step's `values` to metrics.jsonl and the trackers, from the main process."""
        if self.is_main:
            with (self.folder / METRICS).open("a", encoding="utf-8") as file:
                file.write(json.dumps({"step": self.step, **values}) + "\n")
        self.accelerator.log(dict(values), step=self.step)

    def save_checkpoint(self) -> None:
        """Write this step's checkpoint (`checkpoints.save_checkpoint`). Every process calls it."""
        facts = {
            "step": self.step,
            "total_steps": self.total_steps,
            "data_start": self.data_start,
            "unlogged": self.unlogged,
            "batch": self.global_batch,
            "processes": self.accelerator.num_processes,
            "engine": engine_name(self.accelerator),
            "arguments": vars(self.args),
            "digests": self.digests,
        }
        save_checkpoint(
            self.accelerator,
            self.folder / f"checkpoint-{self.step}",
            facts,
            self.write,
            limit=self.args.checkpoints_total_limit,
        )

    def close(self) -> None:
        """End the run on all processes together.

        Otherwise a process might free gloo's process group while gloo's thread still holds gathered
        tensors. The thread would wait for the interpreter's lock, and the process for the thread.
        """
        self.accelerator.wait_for_everyone()
        self.accelerator.end_training()


@contextmanager
def start_run(args: Args, name: str, write: Writer) -> Iterator[Run[Args]]:
    """Start a run: check the arguments, start accelerate, lock the folder, seed all generators.

    Use this as `with start_run(…) as run`. The checks come before anything is loaded. `write` is
    the function that writes the adapter's files into a checkpoint.

    Raises:
        ValueError: a tracker isn't installed. See also `start_accelerator` and `claimed_folder`.
    """
    installed = {str(tracker) for tracker in get_available_trackers()}
    for tracker in args.report_to or []:
        if tracker not in installed:
            raise ValueError(
                f"--report_to {tracker}: this tracker isn't installed (installed: {', '.join(sorted(installed))})."
            )
    accelerator = start_accelerator(args)
    with claimed_folder(args, name, accelerator) as (folder, checkpoint):
        resumed = {} if checkpoint is None else read_manifest(checkpoint)
        run = Run(accelerator, args, name, write, checkpoint, folder, resumed)
        if args.hub_model_id is not None and run.is_main:
            # before training, so that a missing login is reported at once
            run.hub_id = HfApi().create_repo(args.hub_model_id, exist_ok=True).repo_id
        set_seed(args.seed)
        yield run
        run.close()
