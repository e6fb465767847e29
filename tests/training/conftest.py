"""A complete small run of the shared loop: a tiny backbone, NaRA, random answers, a few steps."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from accelerate.state import AcceleratorState, GradientState
from peft import PeftModel

from nara_diffusion.dllm import masked_diffusion_loss
from nara_diffusion.training.adapters.build import build_adapter
from nara_diffusion.training.arguments.checks import check_arguments
from nara_diffusion.training.arguments.common import AdapterArguments, OptimizationArguments, RunArguments
from nara_diffusion.training.checkpoints.folders import save_adapter
from nara_diffusion.training.formats import load_checkpoint
from nara_diffusion.training.loop import train
from nara_diffusion.training.optimization import build_optimizer, build_scheduler
from nara_diffusion.training.run import Run, start_run
from nara_diffusion.training.stream import ShuffledStream, stream_loader


@dataclass
class SmallArguments(AdapterArguments, OptimizationArguments, RunArguments):
    def __post_init__(self) -> None:
        check_arguments(self)


@dataclass
class SmallRun:
    run: Run
    model: PeftModel
    losses: list[float]


@pytest.fixture(autouse=True)
def _fresh_accelerate() -> Iterator[None]:
    yield
    AcceleratorState._reset_state(True)
    GradientState._reset_state()


@pytest.fixture
def small_args(tmp_path) -> Callable[..., SmallArguments]:
    """Arguments of a run of 6 steps with checkpoints each 2, dropout, and a rank that is no other size."""
    defaults: dict[str, Any] = {
        "rank": 3,
        "lora_alpha": 5.0,
        "lora_dropout": 0.2,
        "core_hidden_dims": [5, 7],
        "train_batch_size": 4,
        "max_train_steps": 6,
        "learning_rate": 1e-2,
        "lr_scheduler": "cosine",
        "lr_warmup_steps": 2.0,
        "logging_steps": 1,
        "validation_steps": 3,
        "checkpointing_steps": 2,
        "checkpoints_total_limit": None,
        "output_dir": str(tmp_path / "run"),
    }
    return lambda **changes: SmallArguments(**{**defaults, **changes})


@pytest.fixture
def small_run(tiny_llama) -> Callable[..., SmallRun]:
    """Trains by the script's order of calls; `meddle(step, loss)` may replace each loss, `scaler` is that of fp16."""
    start = {name: value.clone() for name, value in tiny_llama.state_dict().items()}
    generator = torch.Generator().manual_seed(1)
    samples = [{"ids": torch.randint(1, 49, (10,), generator=generator)} for _ in range(9)]

    def go(
        args: SmallArguments,
        meddle: Callable[[int, Any], Any] = lambda step, loss: loss,
        scaler: torch.amp.GradScaler | None = None,
    ) -> SmallRun:
        with start_run(args, "small") as run:
            return trained(args, run, meddle, scaler)

    def trained(args: SmallArguments, run: Run, meddle: Callable, scaler: torch.amp.GradScaler | None) -> SmallRun:
        run.accelerator.scaler = scaler
        backbone = type(tiny_llama)(tiny_llama.config)
        backbone.load_state_dict(start)
        model = build_adapter(backbone, args, total_steps=args.max_train_steps)
        if run.checkpoint:
            load_checkpoint(model, run.checkpoint)
        optimizer = build_optimizer(model, args, run.global_batch, fused=run.fuses_optimizer)
        scheduler = build_scheduler(optimizer, args, args.max_train_steps)
        loader = stream_loader(
            ShuffledStream(samples, args.seed),
            lambda batch: (torch.stack([s["ids"] for s in batch]), torch.tensor([s["position"] for s in batch])),
            **run.batches(args.max_train_steps),
        )
        model, optimizer, scheduler, loader = run.accelerator.prepare(model, optimizer, scheduler, loader)
        run.open()
        losses = []

        def compute_loss(batch: tuple[torch.Tensor, torch.Tensor]) -> Any:
            ids, positions = batch
            loss = masked_diffusion_loss(
                model,
                ids,
                torch.full((len(ids),), 4),
                seed=args.seed,
                sample_indices=positions,
                group_size=run.global_batch,
            )
            losses.append(loss.loss.item())
            return meddle(run.step, loss)

        train(run, model, optimizer, scheduler, loader, args.max_train_steps, compute_loss, lambda: {"validation": 1.0})
        save_adapter(run.accelerator, model, run.folder)
        return SmallRun(run, run.accelerator.unwrap_model(model), losses)

    return go
