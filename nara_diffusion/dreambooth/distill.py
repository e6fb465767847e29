"""The task of teaching a model to sample in K steps without guidance: `--distill_to K`.

The teacher is the base model with guidance and many steps. The student is the same model with an
adapter, and learns to reach in one step the point that the teacher reaches in several (`few_steps`,
`student`). Distillation needs prompts, but no images.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from peft import PeftConfig
from torch import Tensor

from nara_diffusion import NaraConfig
from nara_diffusion.training.adapters import adapter_config, check_target_modules
from nara_diffusion.training.run import Run
from nara_diffusion.utils.data_order import ShuffledStream
from nara_diffusion.utils.digests import digest_texts

from .caches import PromptCache
from .denoiser_files import adapter_loaded
from .draws import seeded_normal
from .encoders import load_encoders
from .families import Family
from .few_steps import FewSteps, check_family, few_steps_of
from .fidelity import Evaluation, Measurement
from .image_arguments import DreamBoothArguments, run_family
from .image_report import figures, student_card
from .objectives import build_objective
from .pipelines import load_base, sharing_pipeline
from .samples import SampleSettings, sample_call, sample_images
from .student import StudentLoss
from .task import Task
from .trajectories import make_trajectories, read_prompts, sample_latents

FIGURES = {
    "validation_loss": "error of a step, share of the base's",
    "similarity": "similarity to the teacher's samples",
    "text_alignment": "alignment with the prompt",
}


@dataclass(frozen=True)
class Distillation:
    """The base model without an adapter, its teacher and its student's steps."""

    args: DreamBoothArguments
    run: Run
    prompts: Sequence[str]  # of each trajectory
    encoders: dict[str, Any]  # those of an `Evaluation`
    pipe: Any  # to be trained
    family: Family
    few_steps: FewSteps
    config: PeftConfig
    teacher: Any  # the pipeline of the teacher
    teacher_call: dict[str, Any]  # the arguments of its call
    student: Any  # the pipeline for the student's samples
    student_call: dict[str, Any]

    @property
    def denoiser(self) -> Any:
        """The denoiser to be trained."""
        return getattr(self.pipe, self.family.denoiser)


def load_distillation(args: DreamBoothArguments, run: Run) -> Distillation:
    """Load prompts, base model and teacher.

    Raises:
        ValueError: an argument doesn't fit the model, or the model can't be distilled.
    """
    assert args.distill_to is not None
    check_family(run_family(args))  # before the model is loaded
    prompts = [prompt for prompt in (args.instance_prompt, args.class_prompt) if prompt]
    if args.prompts_file is not None:
        prompts = read_prompts(args.prompts_file)
    encoders = load_encoders(args, run.accelerator.device)

    pipe: Any = load_base(args, run).to(run.accelerator.device)
    family = run_family(args, pipe)
    teacher, student = (sharing_pipeline(pipe, run.dtype) for _ in range(2))
    few_steps = few_steps_of(
        pipe.scheduler, args.distill_to, args.num_inference_steps, family.is_flow
    )
    teacher.scheduler, student.scheduler = few_steps.teacher_scheduler, few_steps.scheduler
    convention = build_objective(pipe.scheduler).source.convention
    config: Any = adapter_config(args, noise_convention=convention, noise_level_per="sample")
    if isinstance(config, NaraConfig):
        config.few_steps = asdict(few_steps.sampling)
    denoiser = getattr(pipe, family.denoiser)
    check_target_modules(denoiser, getattr(config, "target_modules", None))
    call = sample_call(args, family)
    return Distillation(
        args,
        run,
        [prompts[i % len(prompts)] for i in range(args.trajectories)],
        encoders,
        pipe,
        family,
        few_steps,
        config,
        teacher,
        {**call, **few_steps.teacher_call},
        student,
        {**call, "num_inference_steps": args.distill_to, "guidance_scale": 1.0},
    )


def student_losses(distillation: Distillation) -> tuple[StudentLoss, StudentLoss]:
    """Return the loss on training trajectories, and on held-out trajectories.

    The teacher makes the trajectories, unless a file has them.
    """
    args, run, prompts = distillation.args, distillation.run, distillation.prompts
    trajectories = _trajectories(distillation)
    count = max(1, args.trajectories // 10)
    time_ids = [[args.resolution, args.resolution, 0, 0, args.resolution, args.resolution]]
    held_out = StudentLoss(
        distillation.denoiser,
        trajectories[-count:],
        prompts[-count:],
        distillation.few_steps,
        torch.ones(len(distillation.few_steps.timesteps)),
        build_objective(distillation.pipe.scheduler).source,
        PromptCache(distillation.pipe, distillation.family),
        torch.tensor(time_ids, device=run.accelerator.device),
        args.sample_batch_size,
    )
    base_errors = held_out.curve(distillation.pipe, run.accelerator).mean(1)
    held_out = replace(held_out, base_errors=base_errors)
    loss = replace(held_out, trajectories=trajectories[:-count], prompts=prompts[:-count])
    return loss, held_out


def _trajectories(distillation: Distillation) -> Tensor:
    """Return the teacher's trajectories (n, K + 1, c, h, w), from a file if it has them."""
    args, run, prompts = distillation.args, distillation.run, distillation.prompts
    few_steps, call = distillation.few_steps, distillation.teacher_call
    side = args.resolution // distillation.pipe.vae_scale_factor
    shape = (distillation.denoiser.config.in_channels, side, side)

    def sample(indices: Sequence[int]) -> Tensor:
        noise = seeded_normal(shape, seed=args.seed, stream="trajectory", indices=indices)
        path = sample_latents(distillation.teacher, [prompts[i] for i in indices], noise, call)
        return path[:, :: few_steps.parts].contiguous()

    settings = (args.seed, call, few_steps.timesteps.tolist(), run.dtype)
    texts = [*prompts, *map(str, settings), *run.digests.values()]
    digest = digest_texts(texts)
    run.record_data_digest("training data", [digest])
    folder = Path(args.trajectories_dir or run.folder / "trajectories").expanduser()
    path = folder / f"{digest[:16]}.safetensors"
    return make_trajectories(sample, len(prompts), args.sample_batch_size, path, run.accelerator)


def evaluation_of(distillation: Distillation, held_out: StudentLoss) -> Evaluation:
    """Return the evaluation, with a sample of the teacher for each of the student's."""
    args, run = distillation.args, distillation.run
    settings = SampleSettings(
        args.prompts or list(dict.fromkeys(distillation.prompts))[:4],
        args.num_validation_images,
        args.seed,
        args.sample_batch_size,
        distillation.student_call,
    )
    slow = replace(settings, call=distillation.teacher_call)
    return Evaluation(
        run,
        distillation.student,
        settings,
        held_out,
        sample_images(distillation.teacher, slow, run.accelerator, desc="teacher"),
        **distillation.encoders,
        has_teacher=True,
    )


def student_samples(loss: StudentLoss, seed: int) -> ShuffledStream:
    """Return the samples of training, in their order."""
    return ShuffledStream([{"trajectory": i} for i in range(len(loss.prompts))], seed)


def student_task(distillation: Distillation) -> Task:
    """Return the task of the student."""
    args = distillation.args
    loss, held_out = student_losses(distillation)
    evaluation = evaluation_of(distillation, held_out)
    steps, count = len(loss.few_steps.timesteps), len(loss.prompts)
    return Task(
        distillation.pipe,
        distillation.family,
        distillation.config,
        loss,
        student_samples(loss, args.seed),
        list,
        count * steps,
        evaluation,
        facts={
            "student": f"{steps} steps without guidance, one call each",
            "teacher": f"{args.num_inference_steps} steps, guidance {args.guidance_scale:g}",
            "trained on": f"{count} trajectories of the teacher",
            "validation loss": f"on {len(held_out.prompts)} trajectories held out",
        },
        report=partial(_report, evaluation, held_out),
    )


def _report(
    evaluation: Evaluation, held_out: StudentLoss, before: Measurement, after: Measurement
) -> dict[str, Any]:
    ends = [end_error(evaluation, held_out, folder) for folder in (None, evaluation.run.folder)]
    rows = figures(before, after, FIGURES)
    rows.append(["distance of the end from the teacher's", *(f"{end:.3f}" for end in ends)])
    sampling = held_out.few_steps.sampling
    return {
        "names": (*FIGURES, "curve"),
        "figures": rows,
        "describe": partial(student_card, evaluation, after, sampling),
        "distill_to": sampling.num_inference_steps,
        "end_error_before": ends[0],
        "end_error_after": ends[1],
    }


def end_error(evaluation: Evaluation, held_out: StudentLoss, folder: Path | None) -> float:
    """Return the `end_error` with the adapter in `folder`; None means the base."""
    call = evaluation.settings.call
    with adapter_loaded(evaluation.pipe, folder):
        return held_out.end_error(evaluation.pipe, call, evaluation.run.accelerator)
