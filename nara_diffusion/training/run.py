"""One training run: its accelerator, its folder, the step that it has reached, and its log."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.tracking import get_available_trackers
from accelerate.utils import DistributedType, ProjectConfiguration, broadcast_object_list, set_seed

from nara_diffusion.training.adapters.configs import adapter_config
from nara_diffusion.training.adapters.methods import method_of
from nara_diffusion.training.checkpoints.digests import digest_base, digest_texts
from nara_diffusion.training.checkpoints.folders import (
    check_same_content,
    find_checkpoints,
    locate_checkpoint,
    resolve_checkpoint,
    verify_checkpoint,
)
from nara_diffusion.training.checkpoints.random_states import check_random_states
from nara_diffusion.training.engine.checks import check_engine, launched_processes
from nara_diffusion.training.engine.state import engine_name, load_state
from nara_diffusion.training.output.claim import FolderClaim, claim_together
from nara_diffusion.training.output.endings import explain_ending
from nara_diffusion.training.output.hub import create_hub_repo
from nara_diffusion.training.output.output_dir import check_output_dir, numbered_dirs, write_yaml

from .batches import accumulation_steps, check_accumulation
from .formats import AdapterWriter, write_checkpoint
from .metrics import MetricLog
from .optimization import check_scheduler

logger = logging.getLogger(__name__)


@dataclass
class Run:
    """State of a run.

    Attributes:
        accelerator: accelerate's engine.
        args: the arguments as given.
        name: names numbered output folders and trackers' projects.
        write: writes the adapter's files into a checkpoint.
        checkpoint: the folder that the run continues from, or None.
        step: optimizer steps done.
        folder: where the run writes.
        log: metrics.jsonl and the trackers; set by `open`.
        claim: the lock on `folder` that the main process has.
        hub_id: the repository to push to, on the main process; else None.
        digests: {content: digest}, set by `record_data_digest` and `record_base_digests`.
    """

    accelerator: Accelerator
    args: Any
    name: str
    write: AdapterWriter = write_checkpoint
    checkpoint: Path | None = None
    step: int = 0
    folder: Path = Path()
    hub_id: str | None = None
    digests: dict[str, str] = dataclasses.field(default_factory=dict)
    log: MetricLog = dataclasses.field(init=False)
    claim: FolderClaim | None = None

    def __enter__(self) -> Run:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """End the run, and release its folder. An error of writing, or a signal, says which checkpoint is kept."""
        try:
            if error is None:
                self.close()
            elif (explained := explain_ending(error, self.folder)) is not None:
                raise explained from error
        finally:
            if self.claim is not None:
                self.claim.release()

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

        Not with fp16: there it would itself skip the steps that overflow, and accelerate, which tells a skipped step by
        a call that wasn't made, would step the schedule. Not under DeepSpeed, which has an optimizer of its own.
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
        if self.accelerator.is_main_process:
            write_yaml(self.folder / "config.yaml", dataclasses.asdict(self.args) | {"output_dir": str(self.folder)})
        self.accelerator.project_configuration.set_directories(str(self.folder))
        self.accelerator.project_configuration.logging_dir = str(self.folder / (self.args.logging_dir or ""))
        if self.args.report_to:
            flat = {name: _flat(value) for name, value in dataclasses.asdict(self.args).items()}
            self.accelerator.init_trackers(self.name, config=flat)
        if self.checkpoint is not None:
            load_state(self.accelerator, self.checkpoint)
            check_random_states(self.checkpoint, self.accelerator.process_index)
        if self.is_main:
            logger.info("%s", "; ".join(f"{what}: {value}" for what, value in (facts or {}).items()))
            logger.info("output folder: %s", self.folder)

    def close(self) -> None:
        """End the run on all processes together.

        Without the wait, a process may free gloo's process group while that one's thread still holds gathered tensors:
        the thread waits for the interpreter's lock, and the process for the thread.
        """
        self.accelerator.wait_for_everyone()
        self.accelerator.end_training()


def start_run(args: Any, name: str, write: AdapterWriter = write_checkpoint) -> Run:
    """Check what can be checked before anything is loaded, start accelerate, lock the run's folder, and seed every
    generator. Use it as `with start_run(…) as run`: leaving the block ends the run.

    Args:
        write: writes the adapter's files into a checkpoint.

    Raises:
        ValueError: the output folder holds another run, is in use by one, or can't be written; there is nothing to
            resume from, or it doesn't fit this run; the adapter's settings are impossible; a tracker isn't installed;
            the schedule is unknown; accelerate accumulates otherwise than the arguments say; or see `check_engine`.
    """
    check_scheduler(args.lr_scheduler, args.lr_warmup_steps)
    adapter_config(args, total_steps=args.max_train_steps or 1_000_000)  # raises for impossible settings
    _check_trackers(args.report_to)
    resumed = _latest_run(args, name)
    resume = locate_checkpoint(args.resume_from_checkpoint, resumed)
    check_output_dir(args.output_dir, resume)
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
    run = Run(accelerator, args, name, write)
    if resume is not None:
        run.checkpoint = resolve_checkpoint(resume, resumed)
        run.step = verify_checkpoint(run.checkpoint, args, accelerator.num_processes, engine_name(accelerator))
    if args.push_to_hub and run.is_main:
        run.hub_id = create_hub_repo(args.hub_model_id or Path(args.output_dir).name)
    run.folder, run.claim = claim_together(accelerator, _output_dir(run), name, resume)
    if args.allow_tf32:
        torch.set_float32_matmul_precision("high")
    set_seed(args.seed)
    return run


def _output_dir(run: Run) -> str | None:
    """The folder of the run: a resumed run continues in its own one, unless another was named."""
    if run.args.output_dir is None and run.checkpoint is not None:
        return str(run.checkpoint.parent)
    return run.args.output_dir


def _latest_run(args: Any, name: str) -> Path | None:
    """The folder in which `latest` or a bare `checkpoint-N` is looked for: --output_dir, or the newest numbered one
    that holds a checkpoint."""
    if args.output_dir is not None:
        return Path(args.output_dir)
    runs = numbered_dirs(name)
    return next((runs[number] for number in sorted(runs, reverse=True) if find_checkpoints(runs[number])), None)


def _check_trackers(report_to: list[str] | None) -> None:
    available = [str(tracker) for tracker in get_available_trackers()]
    for tracker in report_to or []:
        if tracker not in available:
            installed = ", ".join(available) or "none"
            raise ValueError(f"report_to names {tracker!r}, which isn't installed here (installed: {installed}).")


def _flat(value: Any) -> Any:
    return ",".join(map(str, value)) if isinstance(value, list) else value if value is not None else "none"
