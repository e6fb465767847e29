"""One training run: its accelerator, its folder, the step that it has reached, its losses, and its log."""

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
import yaml
from accelerate import Accelerator
from accelerate.tracking import get_available_trackers
from accelerate.utils import DistributedType, broadcast_object_list, set_seed
from huggingface_hub import HfApi

from nara_diffusion.utils.atomic_write import atomic_write

from .adapters import method_of
from .arguments import TrainingArguments, public_arguments
from .checkpoints import (
    Writer,
    changed_arguments,
    check_random_states,
    explained_disk_errors,
    listed,
    warn_of_pickles,
)
from .engines import engine_name, global_batch, load_state, start_accelerator
from .manifest import digest_base, digest_texts, read_manifest
from .options import given_arguments
from .run_folder import CONFIG, LOCK, claimed_folder

METRICS = "metrics.jsonl"

logger = logging.getLogger(__name__)

Args = TypeVar("Args", bound=TrainingArguments, covariant=True)


@dataclass
class Run(Generic[Args]):
    """State of a run, which `start_run` gives.

    Attributes:
        accelerator: accelerate's engine.
        args: the arguments as given.
        name: names numbered output folders and trackers' projects.
        write: writes the adapter's files into a checkpoint.
        checkpoint: the folder that the run continues from, or None.
        folder: where the run writes.
        resumed: the manifest of `checkpoint`; empty without one.
        started: when, by `time.perf_counter`.
        step: optimizer steps done.
        total_steps: optimizer steps to do; set by `plan`.
        data_start: the step at which the training data began: 0, unless a resumed run was given others.
        unlogged: the sum of the samples' losses since they were last logged, and their number.
        hub_id: the repository to upload to, on the main process; else None.
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
        """Whether this process is the one that writes and prints."""
        return self.accelerator.is_main_process

    @property
    def hardware(self) -> str:
        """The hardware of the run, in words."""
        if self.accelerator.device.type == "cuda":
            device = torch.cuda.get_device_name(self.accelerator.device)
        else:
            device = f"{self.accelerator.device.type}, {torch.get_num_threads()} threads"
        return f"{self.accelerator.num_processes} x {device}"

    @property
    def global_batch(self) -> int:
        """Samples of one optimizer step, over all processes and accumulated forwards."""
        return global_batch(self.accelerator, self.args)

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the frozen weights: that of the forward's mixed precision."""
        return {"fp16": torch.float16, "bf16": torch.bfloat16}.get(
            self.accelerator.mixed_precision, torch.float32
        )

    @property
    def weights_dtype(self) -> torch.dtype:
        """Dtype to load the model in: float32 where all weights are trained, since small steps are lost in others."""
        return torch.float32 if method_of(self.args).family == "full" else self.dtype

    @property
    def fuses_optimizer(self) -> bool:
        """Whether AdamW may be PyTorch's fused one, which takes a third of the time for an adapter's many tensors.

        Not with fp16: there it would itself skip the steps that overflow, and accelerate, which recognises a skipped
        step by a call that wasn't made, would step the schedule. Not under DeepSpeed, which has its own optimizer.
        """
        accelerator = self.accelerator
        known = accelerator.device.type in ("cpu", "cuda")
        return (
            known
            and accelerator.scaler is None
            and accelerator.distributed_type != DistributedType.DEEPSPEED
        )

    # ---------------------------------------------------------------- what it rests on

    def record_data_digest(self, what: str, texts: Iterable[str]) -> None:
        """Record the digest of "training data" or "validation data" for the run's checkpoints. A resumed run says
        if they have changed; the order of other training data starts anew. Call it before `plan`."""
        self.digests[what] = digest_texts(texts)
        if self.resumed.get("digests", self.digests).get(what) == self.digests[what]:
            return
        anew = ""
        if what == "training data":
            self.data_start, anew = self.step, f": their order starts anew at step {self.step}"
        if self.is_main:
            logger.warning("%s was written with other %s%s", self.checkpoint, what, anew)

    def record_base_digests(self, folders: Mapping[str, Path], variant: str | None = None) -> None:
        """Record the digests of the base model (see `digest_base`) for the run's checkpoints. Raises ValueError if the
        run resumes a checkpoint with others."""
        digests = [digest_base(folders, variant) if self.is_main else {}]
        self.digests |= broadcast_object_list(digests)[0]
        saved = self.resumed.get("digests", self.digests)
        for what, digest in self.digests.items():
            if what.startswith("base model") and saved.get(what, digest) != digest:
                raise ValueError(
                    f"{self.checkpoint} belongs to a run with another {what}: bring it back, or start a new run."
                )

    def plan(self, samples: int) -> int:
        """The optimizer steps of the run, with those done: `--max_train_steps`, or as many as cover
        `--num_train_epochs` of `samples` training samples, one by default. Raises ValueError if a checkpoint is past
        them."""
        passes = max(1, math.ceil((self.args.num_train_epochs or 1) * samples / self.global_batch))
        self.total_steps = self.args.max_train_steps or self.data_start + passes
        if self.total_steps < self.step:
            raise ValueError(
                f"the run ends at step {self.total_steps}, and {self.checkpoint} is past it: give --max_train_steps or "
                "--num_train_epochs beyond, or resume an earlier checkpoint."
            )
        return self.total_steps

    @property
    def batches(self) -> dict[str, int]:
        """The arguments of `stream_loader`: the batch size of a forward, and the positions left to train on."""
        first, stop = (
            self.global_batch * (step - self.data_start) for step in (self.step, self.total_steps)
        )
        return {"batch_size": self.args.train_batch_size, "first": first, "stop": stop}

    # ---------------------------------------------------------------- beginning and end

    def open(self, facts: Mapping[str, str] | None = None) -> None:
        """Save the configuration in the run's folder, restore a checkpoint's optimizer and random states, and log
        `facts`. Called when data and model have proved usable, and `accelerator.prepare` has seen what is restored."""
        settings = given_arguments(self.args)
        if self.is_main:
            with atomic_write(self.folder / CONFIG) as partial:
                content = settings | {"output_dir": str(self.folder)}
                partial.write_text(
                    yaml.safe_dump(content, sort_keys=False, allow_unicode=True), encoding="utf-8"
                )
            self._forget_later_steps()
        self.accelerator.project_configuration.set_directories(str(self.folder))
        self.accelerator.project_configuration.logging_dir = str(self.folder)
        if self.args.report_to:
            self.accelerator.init_trackers(
                self.name, {name: str(value) for name, value in settings.items()}
            )
        if self.checkpoint is not None:
            self._restore(self.checkpoint)
        if self.is_main:
            logger.info(
                "%s", "; ".join(f"{what}: {value}" for what, value in (facts or {}).items())
            )
            logger.info("output folder: %s", self.folder)

    def _restore(self, checkpoint: Path) -> None:
        if self.is_main:
            warn_of_pickles(checkpoint, engine_name(self.accelerator))
        load_state(self.accelerator, checkpoint)
        check_random_states(checkpoint, self.accelerator.process_index)
        if not self.is_main:
            return
        logger.info("goes on from %s", checkpoint)
        if changed := changed_arguments(self.args, self.resumed["arguments"]):
            logger.info("changed arguments: %s", listed(changed))
        if (before := self.resumed["total_steps"]) != self.total_steps:
            logger.info("the schedule now has %d steps instead of %d", self.total_steps, before)

    def _forget_later_steps(self) -> None:
        """Drop the lines of steps that are taken again, and broken ones, as a killed run leaves its last."""
        if not (path := self.folder / METRICS).exists():
            return
        kept, broken = [], []
        for number, line in enumerate(path.read_bytes().split(b"\n")[:-1], 1):
            try:
                step = json.loads(line)["step"]
            except (ValueError, KeyError, TypeError):
                broken.append(number)
            else:
                kept += [line + b"\n"] * (step <= self.step)
        if broken:
            logger.warning("%s: broken lines are dropped (%s)", path, ", ".join(map(str, broken)))
        with atomic_write(path) as partial:
            partial.write_bytes(b"".join(kept))

    def log(self, values: Mapping[str, Any]) -> None:
        """Append `values` of the step to metrics.jsonl, and hand them to the trackers, from the main process."""
        if self.is_main:
            with (self.folder / METRICS).open("a", encoding="utf-8") as file:
                file.write(json.dumps({"step": self.step, **values}) + "\n")
        self.accelerator.log(dict(values), step=self.step)

    def facts_of_checkpoint(self) -> dict[str, Any]:
        """What a checkpoint's manifest says of the run."""
        return {
            "step": self.step,
            "total_steps": self.total_steps,
            "data_start": self.data_start,
            "unlogged": self.unlogged,
            "batch": self.global_batch,
            "processes": self.accelerator.num_processes,
            "engine": engine_name(self.accelerator),
            "arguments": given_arguments(self.args),
            "digests": self.digests,
        }

    def upload(self) -> None:
        """Upload the folder, without its checkpoints, to the repository of `--hub_model_id`, if there is one."""
        if self.hub_id is not None:
            HfApi().upload_folder(
                repo_id=self.hub_id,
                folder_path=str(self.folder),
                commit_message="End of training",
                ignore_patterns=["checkpoint-*/**", ".partial-*", LOCK, CONFIG],
            )
            settings = yaml.safe_dump(
                public_arguments(self.args), sort_keys=False, allow_unicode=True
            )
            content = (
                settings.encode()
            )  # the folder's own has whole paths, by which the run resumes
            HfApi().upload_file(repo_id=self.hub_id, path_in_repo=CONFIG, path_or_fileobj=content)

    def close(self) -> None:
        """End the run on all processes together.

        Without the wait, a process may free gloo's process group while that one's thread still holds gathered tensors:
        the thread waits for the interpreter's lock, and the process for the thread.
        """
        self.accelerator.wait_for_everyone()
        self.accelerator.end_training()


@contextmanager
def start_run(args: Args, name: str, write: Writer) -> Iterator[Run[Args]]:
    """`with start_run(…) as run`: check what can be checked before anything is loaded, start accelerate, take the
    folder, and seed every generator. `write` writes the adapter's files into a checkpoint.

    Raises:
        ValueError: a tracker isn't installed; or see `start_accelerator` and `claimed_folder`.
    """
    if unknown := set(args.report_to or []) - (
        known := {str(tracker) for tracker in get_available_trackers()}
    ):
        raise ValueError(
            f"report_to names {min(unknown)!r}, which isn't installed here (installed: {sorted(known)})."
        )
    accelerator = start_accelerator(args)
    with (
        claimed_folder(args, name, accelerator) as (folder, checkpoint),
        explained_disk_errors(folder),
    ):
        resumed = {} if checkpoint is None else read_manifest(checkpoint)
        run = Run(accelerator, args, name, write, checkpoint, folder, resumed)
        if (
            args.hub_model_id is not None and run.is_main
        ):  # now, so that a missing login shows before the training
            run.hub_id = HfApi().create_repo(args.hub_model_id, exist_ok=True).repo_id
        set_seed(args.seed)
        yield run
        run.close()
