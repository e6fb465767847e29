"""The task of teaching a model to sample in K steps without guidance: `--distill_to K`.

The teacher is the base model with guidance and many steps. The student is the same model with an
adapter, and learns to reach in one step the point that the teacher reaches in several
(`few_steps`). Distillation needs prompts, but no images.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from PIL.Image import Image
from torch import Tensor

from nara_diffusion import NaraConfig
from nara_diffusion.training.adapters import adapter_config, check_target_modules
from nara_diffusion.training.run import Run
from nara_diffusion.tuner.usage import FewStepSampling
from nara_diffusion.utils.data_order import ShuffledStream
from nara_diffusion.utils.files import digest_texts

from .caches import PromptCache
from .draws import seeded_normal
from .encoders import load_encoders
from .few_steps import (
    StudentLoss,
    landings,
    make_trajectories,
    sample_latents,
    student_sampler,
    teacher_sampler,
)
from .fidelity import Evaluation, Measurement, Task
from .image_arguments import DreamBoothArguments, run_family
from .image_report import figures, student_card
from .objectives import build_objective
from .pipelines import family_of, load_base, sharing_pipeline
from .samples import SampleSettings, sample_call, sample_images

FIGURES = {
    "validation_loss": "error of a step, share of the base's",
    "similarity": "similarity to the teacher's samples",
    "text_alignment": "alignment with the prompt",
}


def student_task(args: DreamBoothArguments, run: Run) -> Task:
    """Load prompts, base model and teacher, and return the task of the student.

    Raises:
        ValueError: an argument doesn't fit the model, or the model can't be distilled.
    """
    assert args.distill_to is not None
    run_family(args)  # before the model is loaded
    texts = [prompt for prompt in (args.instance_prompt, args.class_prompt) if prompt]
    if args.prompts_file is not None:
        texts = read_prompts(args.prompts_file)
    prompts = [texts[i % len(texts)] for i in range(args.trajectories)]
    encoders = load_encoders(args, run.accelerator.device)

    # base and adapter
    pipe: Any = load_base(args, run).to(run.accelerator.device)
    family, source = run_family(args, pipe), build_objective(pipe.scheduler).source
    student: Any = sharing_pipeline(pipe, run.dtype)
    student.scheduler, sampling = student_sampler(pipe.scheduler, args.distill_to, family.is_flow)
    denoiser = getattr(pipe, family.denoiser)
    config: Any = adapter_config(args, noise_convention=source.convention, noise_level_per="sample")
    if isinstance(config, NaraConfig):
        config.few_steps = asdict(sampling)
    check_target_modules(denoiser, getattr(config, "target_modules", None))

    # loss and evaluation
    settings = SampleSettings(
        args.prompts or list(dict.fromkeys(prompts))[:4],
        args.num_validation_images,
        args.seed,
        args.sample_batch_size,
        {
            **sample_call(args, family),
            "num_inference_steps": args.distill_to,
            "guidance_scale": 1.0,
        },
    )
    trajectories, references = teacher_samples(args, run, student, settings, prompts)
    side = args.resolution
    loss, held_out = StudentLoss(
        denoiser,
        trajectories,
        prompts,
        *landings(student.scheduler, args.distill_to),
        torch.ones(args.distill_to),
        source,
        PromptCache(pipe, family),
        torch.tensor([[side, side, 0, 0, side, side]], device=run.accelerator.device),
        args.sample_batch_size,
    ).split(pipe, run.accelerator)
    count = len(loss.prompts)
    evaluation = Evaluation(
        run, student, settings, held_out, references, **encoders, has_teacher=True
    )
    return Task(
        pipe,
        family,
        config,
        loss,
        ShuffledStream([{"trajectory": i} for i in range(count)], args.seed),
        list,
        count * args.distill_to,
        evaluation,
        facts={
            "student": f"{args.distill_to} steps without guidance, one call each",
            "teacher": f"{args.num_inference_steps} steps, guidance {args.guidance_scale:g}",
            "trained on": f"{count} trajectories of the teacher",
            "validation loss": f"on {len(held_out.prompts)} trajectories held out",
        },
        report=partial(_report, evaluation, sampling),
    )


def teacher_samples(
    args: DreamBoothArguments,
    run: Run,
    pipe: Any,
    settings: SampleSettings,
    prompts: Sequence[str],
) -> tuple[Tensor, list[Image]]:
    """Return the teacher's trajectories (n, K + 1, c, h, w), from a file if it has them, and images.

    Args:
        pipe: a pipeline with the student's scheduler.
        settings: those of the student's images.
        prompts: the prompt of each trajectory.
    """
    scheduler, steps = pipe.scheduler, settings.call["num_inference_steps"]
    parts = args.num_inference_steps // steps
    timesteps, _ = landings(scheduler, steps)
    pipe.scheduler, options = teacher_sampler(scheduler, steps, parts)
    call = {
        **settings.call,
        "num_inference_steps": args.num_inference_steps,
        "guidance_scale": args.guidance_scale,
        **options,
    }
    side = args.resolution // pipe.vae_scale_factor
    shape = (getattr(pipe, family_of(pipe).denoiser).config.in_channels, side, side)

    def sample(indices: Sequence[int]) -> Tensor:
        noise = seeded_normal(shape, seed=args.seed, stream="trajectory", indices=indices)
        path = sample_latents(pipe, [prompts[i] for i in indices], noise, call)
        return path[:, ::parts].contiguous()

    digested = (args.seed, call, timesteps.tolist(), run.dtype)
    digest = digest_texts([*prompts, *map(str, digested), *run.digests.values()])
    run.record_data_digest("training data", [digest])
    folder = Path(args.trajectories_dir or run.folder / "trajectories").expanduser()
    path = folder / f"{digest[:16]}.safetensors"
    trajectories = make_trajectories(
        sample, len(prompts), args.sample_batch_size, path, run.accelerator
    )
    images = sample_images(pipe, replace(settings, call=call), run.accelerator, desc="teacher")
    pipe.scheduler = scheduler
    return trajectories, images


def _report(
    evaluation: Evaluation, sampling: FewStepSampling, before: Measurement, after: Measurement
) -> dict[str, Any]:
    return {
        "names": (*FIGURES, "curve"),
        "figures": figures(before, after, FIGURES),
        "describe": partial(student_card, evaluation, after, sampling),
        "distill_to": sampling.num_inference_steps,
    }


def read_prompts(path: str) -> list[str]:
    """Return the prompts in a text file, one per line. Empty lines are skipped.

    Raises:
        ValueError: the file can't be read as text or has no prompt.
    """
    try:
        lines = Path(path).expanduser().read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(
            f"--prompts_file {path} can't be read ({error}): name a text file."
        ) from error
    prompts = [line.strip() for line in lines if line.strip()]
    if not prompts:
        raise ValueError(f"--prompts_file {path} contains no prompts: write one per line.")
    return prompts
