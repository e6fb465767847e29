"""One training run: its accelerator, its folder, the step that it has reached, and its log."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from accelerate import Accelerator
from accelerate.tracking import get_available_trackers
from accelerate.utils import DistributedType, ProjectConfiguration, broadcast_object_list, set_seed
from huggingface_hub import HfApi

from nara_diffusion.utils.atomic_write import atomic_write

from .checkpoints import (
    Writer,
    check_random_states,
    check_same_content,
    resolve_checkpoint,
    verify_checkpoint,
)
from .digests import digest_base, digest_texts
from .engine_checks import accumulation_steps, check_accumulation, check_engine, launched_processes
from .engines import load_state
from .measures import MetricLog
from .methods import method_of
from .options import given_arguments
from .run_folder import LOCK, claimed_folder, latest_run

logger = logging.getLogger(__name__)


@dataclass
class Run:
    """State of a run, which `start_run` gives.

    Attributes:
        accelerator: accelerate's engine.
        args: the arguments as given.
        name: names numbered output folders and trackers' projects.
        write: writes the adapter's files into a checkpoint.
        checkpoint: the folder that the run continues from, or None.
        folder: where the run writes.
        step: optimizer steps done.
        log: metrics.jsonl and the trackers; set by `open`.
        hub_id: the repository to upload to, on the main process; else None.
        digests: {content: digest}, set by `record_data_digest` and `record_base_digests`.
    """

    accelerator: Accelerator
    args: Any
    name: str
    write: Writer
    checkpoint: Path | None
    folder: Path
    step: int = 0
    hub_id: str | None = None
    digests: dict[str, str] = dataclasses.field(default_factory=dict)
    log: MetricLog = dataclasses.field(init=False)

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
        accelerator = self.accelerator
        return self.args.train_batch_size * accelerator.gradient_accumulation_steps * accelerator.num_processes

    def batches(self, total_steps: int) -> dict[str, int]:
        """The arguments of `stream_loader`: the batch size of a forward, and the positions left to train on."""
        first, stop = self.step * self.global_batch, total_steps * self.global_batch
        return {"batch_size": self.args.train_batch_size, "first": first, "stop": stop}

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the frozen weights: that of the forward's mixed precision."""
        return {"fp16": torch.float16, "bf16": torch.bfloat16}.get(self.accelerator.mixed_precision, torch.float32)

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
        return known and accelerator.scaler is None and accelerator.distributed_type != DistributedType.DEEPSPEED

    def record_data_digest(self, what: str, texts: Iterable[str]) -> None:
        """Record the digest of data for the run's checkpoints.

        Args:
            what: "training data" or "validation data", as `option` has it for the arguments that name them.

        Raises:
            ValueError: the run resumes a checkpoint that has another digest.
        """
        self._record(what, digest_texts(texts))

    def record_base_digests(self, folders: Mapping[str, Path], variant: str | None = None) -> None:
        """Record the digests of the base model's weights and configurations for the run's checkpoints.

        Args:
            folders, variant: see `digest_base`.

        Raises:
            ValueError: the run resumes a checkpoint that has other digests.
        """
        digests = [digest_base(folders, variant) if self.is_main else {}]
        for what, digest in broadcast_object_list(digests)[0].items():
            self._record(what, digest)

    def _record(self, what: str, digest: str) -> None:
        self.digests[what] = digest
        if self.checkpoint is not None:
            check_same_content(self.checkpoint, self.args, what, digest)

    def open(self, facts: Mapping[str, str] | None = None) -> None:
        """Save the configuration in the run's folder, and restore a checkpoint's optimizer and random states.

        Called when data and model have proved usable, and `accelerator.prepare` has seen what is to be restored.
        `facts` about the run are logged.

        Raises:
            ValueError: preparing changed the accumulation, as DeepSpeed's configuration can; a random state can't be
                restored.
        """
        check_accumulation(self.accelerator, accumulation_steps(self.args, self.accelerator.num_processes))
        self.log = MetricLog(self.accelerator, self.folder, self.step)
        settings = given_arguments(self.args)
        if self.is_main:
            with atomic_write(self.folder / "config.yaml") as partial:
                content = settings | {"output_dir": str(self.folder)}
                partial.write_text(yaml.safe_dump(content, sort_keys=False, allow_unicode=True), encoding="utf-8")
        self.accelerator.project_configuration.set_directories(str(self.folder))
        self.accelerator.project_configuration.logging_dir = str(self.folder)
        if self.args.report_to:
            self.accelerator.init_trackers(self.name, {name: str(value) for name, value in settings.items()})
        if self.checkpoint is not None:
            load_state(self.accelerator, self.checkpoint)
            check_random_states(self.checkpoint, self.accelerator.process_index)
        if self.is_main:
            logger.info("%s", "; ".join(f"{what}: {value}" for what, value in (facts or {}).items()))
            logger.info("output folder: %s", self.folder)

    def upload(self) -> None:
        """Upload the folder, without its checkpoints, to the repository of `--hub_model_id`, if there is one."""
        if self.hub_id is not None:
            ignored = ["checkpoint-*/**", ".partial-*", LOCK]
            HfApi().upload_folder(
                repo_id=self.hub_id,
                folder_path=str(self.folder),
                commit_message="End of training",
                ignore_patterns=ignored,
            )

    def close(self) -> None:
        """End the run on all processes together.

        Without the wait, a process may free gloo's process group while that one's thread still holds gathered tensors:
        the thread waits for the interpreter's lock, and the process for the thread.
        """
        self.accelerator.wait_for_everyone()
        self.accelerator.end_training()


@contextmanager
def start_run(args: Any, name: str, write: Writer) -> Iterator[Run]:
    """Check what can be checked before anything is loaded, start accelerate, and seed every generator.

    Use it as `with start_run(…) as run`: the folder is this run's inside of the block.

    Args:
        write: writes the adapter's files into a checkpoint.

    Raises:
        ValueError: the output folder is or holds another run's, or can't be written; there is nothing to resume from,
            or it doesn't fit this run; a tracker isn't installed; accelerate accumulates otherwise than the arguments
            say; or see `check_engine`.
    """
    if unknown := set(args.report_to or []) - (known := {str(tracker) for tracker in get_available_trackers()}):
        raise ValueError(f"report_to names {min(unknown)!r}, which isn't installed here (installed: {sorted(known)}).")
    checkpoint = None
    if args.resume_from_checkpoint is not None:
        checkpoint = resolve_checkpoint(args.resume_from_checkpoint, latest_run(args, name))
    steps = accumulation_steps(args, launched_processes())
    accelerator = Accelerator(
        gradient_accumulation_steps=steps,
        mixed_precision=args.mixed_precision,
        log_with=args.report_to,
        project_config=ProjectConfiguration(logging_dir="."),  # asked for by trackers; `Run.open` gives the true one
        step_scheduler_with_optimizer=False,  # the loop steps the schedule once an optimizer step
    )
    check_engine(accelerator, args)
    check_accumulation(accelerator, steps)
    with claimed_folder(args, name, checkpoint, accelerator.is_main_process) as folder:
        run = Run(accelerator, args, name, write, checkpoint, folder)
        if checkpoint is not None:
            run.step = verify_checkpoint(checkpoint, args, accelerator)
        if args.hub_model_id is not None and run.is_main:  # now, so that a missing login shows before the training
            run.hub_id = HfApi().create_repo(args.hub_model_id, exist_ok=True).repo_id
        set_seed(args.seed)
        yield run
        run.close()
