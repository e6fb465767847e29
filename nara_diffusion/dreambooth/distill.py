"""Teach a model to sample in K steps without guidance: `--distill_to K`.

The teacher is the base model with guidance and many steps. With --init_adapter, the teacher also
has that adapter. The student is the same model with a new adapter, and learns to reach in one step
the point that the teacher reaches in several (`few_steps`, `student`). Distillation needs prompts,
but no images.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nara_diffusion import NaraConfig
from nara_diffusion.loaders.tensor_files import is_nara
from nara_diffusion.training.adapters import adapter_config, check_target_modules, title_of
from nara_diffusion.training.checkpoints import save_adapter
from nara_diffusion.training.loop import prepare_training, train
from nara_diffusion.training.report import finish
from nara_diffusion.training.run import Run
from nara_diffusion.tuner.usage import TIMESTEP_SETTINGS
from nara_diffusion.utils.data_order import ShuffledStream
from nara_diffusion.utils.digests import digest_file, digest_texts
from nara_diffusion.utils.repositories import local_folder

from .caches import PromptCache
from .cut_prompts import prompt_sources, warn_of_cut_prompts
from .denoiser import AdaptedDenoiser, read_checkpoint, write_adapter
from .draws import seeded_normal
from .encoders import load_encoders, paired_similarity
from .few_steps import (
    check_family,
    landings,
    make_trajectories,
    read_prompts,
    sample_latents,
    student_sampler,
    teacher_sampler,
)
from .fidelity import Evaluation
from .image_arguments import DreamBoothArguments, run_family
from .image_report import SUBJECT, describe_student, figures
from .objectives import build_objective
from .pipelines import load_base, sharing_pipeline
from .samples import SampleSettings, sample_call, sample_images
from .student import StudentLoss

FIGURES = {
    "validation_loss": "error of a step, share of the base's",
    "similarity": "similarity to the teacher's samples",
    "text_alignment": "alignment with the prompt",
}
"""{a figure in results.json: its name in the report}."""


class Distillation:
    """A run of `--distill_to`. Call `train`, then `report`."""

    def __init__(self, args: DreamBoothArguments, run: Run) -> None:
        assert args.distill_to is not None
        self.args, self.run, self.steps = args, run, args.distill_to
        check_family(run_family(args))  # before the model is loaded
        self.prompts = self._prompts()
        device = run.accelerator.device
        self.encoders = load_encoders(args, device)
        self.pipe = load_base(args, run).to(device)
        if run.is_main:
            warn_of_cut_prompts(self.pipe, prompt_sources(args))
        self.family = run_family(args, self.pipe)
        self.denoiser = getattr(self.pipe, self.family.denoiser)
        self.source = build_objective(self.pipe.scheduler).source
        self._set_samplers()
        self.config = self._config()
        check_target_modules(self.denoiser, getattr(self.config, "target_modules", None))
        self.beside = None if args.init_adapter is None else SUBJECT
        if args.init_adapter is not None:
            is_own_nara = is_nara(Path(args.init_adapter).expanduser())
            for pipe in (self.pipe, self.teacher, self.sampling_pipe):
                load: Any = pipe.load_nara_weights if is_own_nara else pipe.load_lora_weights
                load(args.init_adapter, adapter_name=SUBJECT)

    def _prompts(self) -> list[str]:
        """Return one prompt for each trajectory."""
        args = self.args
        known = [prompt for prompt in (args.instance_prompt, args.class_prompt) if prompt]
        if args.prompts_file is not None:
            known = read_prompts(args.prompts_file)
        return [known[i % len(known)] for i in range(args.trajectories)]

    def _set_samplers(self) -> None:
        """Set the pipelines of teacher and student, and the arguments of their calls."""
        args, steps = self.args, self.steps
        call = sample_call(args, self.family)
        self.student_call = {**call, "num_inference_steps": steps, "guidance_scale": 1.0}
        self.sampling_pipe = sharing_pipeline(self.pipe, self.run.dtype)
        sampler, self.line = student_sampler(self.pipe.scheduler, steps, self.family.is_flow)
        self.sampling_pipe.scheduler = sampler
        self.timesteps, self.landings = landings(sampler, steps)
        self.teacher = sharing_pipeline(self.pipe, self.run.dtype)
        self.parts = args.num_inference_steps // steps
        self.teacher.scheduler, more = teacher_sampler(sampler, steps, self.parts)
        self.teacher_call = {**call, **more}

    def _config(self) -> Any:
        convention = self.source.convention
        config: Any = adapter_config(
            self.args, noise_convention=convention, noise_level_per="sample"
        )
        if isinstance(config, NaraConfig):
            sampler = self.sampling_pipe.scheduler
            config.few_steps = {
                "num_inference_steps": self.steps,
                "guidance_scale": 1.0,
                "timesteps": self.timesteps.tolist(),
                "scheduler": self.line,
                **{name: sampler.config.get(name) for name in TIMESTEP_SETTINGS},
            }
        return config

    # ------------------------------------------------------------------ data

    def _trajectories(self) -> Tensor:
        """Return the teacher's trajectories (n, K + 1, c, h, w), from a file if it has them."""
        args, run, prompts = self.args, self.run, self.prompts
        side = args.resolution // self.pipe.vae_scale_factor
        shape = (self.denoiser.config.in_channels, side, side)

        def sample(indices: Sequence[int]) -> Tensor:
            noise = seeded_normal(shape, seed=args.seed, stream="trajectory", indices=indices)
            given = [prompts[i] for i in indices]
            path = sample_latents(self.teacher, given, noise, self.teacher_call)
            return path[:, :: self.parts].contiguous()

        settings = (args.seed, self.teacher_call, self.timesteps.tolist(), run.dtype)
        texts = [*prompts, *map(str, settings), *run.digests.values()]
        if args.init_adapter is not None:
            texts += digests_of(args.init_adapter)
        digest = digest_texts(texts)
        run.record_data_digest("training data", [digest])
        folder = Path(args.trajectories_dir or run.folder / "trajectories").expanduser()
        path = folder / f"{digest[:16]}.safetensors"
        size = args.sample_batch_size
        return make_trajectories(sample, len(prompts), size, path, run.accelerator)

    def _losses(self) -> tuple[StudentLoss, StudentLoss]:
        """Return the loss on training trajectories, and on held-out trajectories."""
        args, prompts = self.args, self.prompts
        trajectories = self._trajectories()
        count = max(1, args.trajectories // 10)
        time_ids = [[args.resolution, args.resolution, 0, 0, args.resolution, args.resolution]]
        held_out = StudentLoss(
            self.denoiser,
            trajectories[-count:],
            prompts[-count:],
            self.timesteps,
            self.landings,
            torch.ones(self.steps),
            self.source,
            PromptCache(self.pipe, self.family),
            torch.tensor(time_ids, device=self.run.accelerator.device),
            args.sample_batch_size,
        )
        base_errors = held_out.curve(self.pipe, self.run.accelerator).mean(1)
        held_out = replace(held_out, base_errors=base_errors)
        loss = replace(held_out, trajectories=trajectories[:-count], prompts=prompts[:-count])
        return loss, held_out

    # ------------------------------------------------------------------ the run

    def train(self) -> None:
        """Train from the start or a checkpoint to the last step, and write the adapter."""
        args, run = self.args, self.run
        loss, self.held_out = self._losses()
        count = len(loss.prompts)
        steps = run.plan(count * self.steps)
        self.evaluation = self._evaluation()
        model = self._model()
        parts = prepare_training(run, model, self.samples_of(loss), list)
        self.trainable = sum(parameter.numel() for parameter in model.trained.values())
        teacher = f"{args.num_inference_steps} steps, guidance {args.guidance_scale:g}"
        self.facts = {
            "base": f"{args.pretrained_model_name_or_path} at {args.resolution} pixels",
            "adapter": title_of(args),
            "student": f"{self.steps} steps without guidance, one call each",
            "teacher": teacher + (f", with {args.init_adapter}" if args.init_adapter else ""),
            "trained on": f"{count} trajectories of the teacher",
            "validation loss": f"on {len(self.held_out.prompts)} trajectories held out",
            "optimizer steps": f"{steps} of {run.global_batch} samples",
            "trainable parameters": f"{self.trainable:,}",
            "hardware": run.hardware,
        }
        run.open(self.facts)
        run.restore()
        validate = partial(self.evaluation.validate, parts[0])
        train(run, parts, replace(loss, model=parts[0]), validate)
        save_adapter(run.accelerator, parts[0], run.folder, write_adapter)

    def samples_of(self, loss: StudentLoss) -> ShuffledStream:
        """Return the samples of training, in their order."""
        numbers = [{"trajectory": number} for number in range(len(loss.prompts))]
        return ShuffledStream(numbers, self.args.seed)

    def _model(self) -> AdaptedDenoiser:
        model = AdaptedDenoiser(
            self.pipe,
            self.config,
            gradient_checkpointing=self.args.gradient_checkpointing,
            family=self.family,
            beside=self.beside,
        )
        if self.run.checkpoint is not None:
            read_checkpoint(model, self.run.checkpoint)
        return model

    def _evaluation(self) -> Evaluation:
        """Return the evaluation, with a sample of the teacher for each of the student's."""
        args = self.args
        settings = SampleSettings(
            args.prompts or list(dict.fromkeys(self.prompts))[:4],
            args.num_validation_images,
            args.seed,
            args.sample_batch_size,
            self.student_call,
        )
        slow = replace(settings, call=self.teacher_call)
        images = sample_images(self.teacher, slow, self.run.accelerator, desc="teacher")
        return Evaluation(
            self.run,
            self.sampling_pipe,
            settings,
            self.held_out,
            images,
            **self.encoders,
            compare=paired_similarity,
            title="the teacher",
            beside=self.beside,
        )

    def end_error(self, folder: Path | None) -> float:
        """Return the held-out `end_error` with the adapter in `folder`; None means the base."""
        call, accelerator = self.student_call, self.run.accelerator
        with self.evaluation.loaded(folder):
            return self.held_out.end_error(self.sampling_pipe, call, accelerator)

    def report(self) -> dict[str, Any]:
        """Measure, write the report, and return the content of results.json."""
        args, run = self.args, self.run
        before = self.evaluation.measure(None, "before")
        after = self.evaluation.measure(run.folder, "after")
        ends = [self.end_error(None), self.end_error(run.folder)]
        rows = figures(before, after, FIGURES)
        rows.append(["distance of the end from the teacher's", *(f"{end:.3f}" for end in ends)])
        measured = (self.evaluation, before, after)
        return finish(
            run,
            before,
            after,
            names=(*FIGURES, "curve"),
            figures=rows,
            facts=self.facts,
            schedule_line="",
            describe=partial(describe_student, *measured, self.pipe, self.line),
            n=len(after.images),
            trainable_parameters=self.trainable,
            base_model=args.pretrained_model_name_or_path,
            resolution=args.resolution,
            distill_to=self.steps,
            end_error_before=ends[0],
            end_error_after=ends[1],
        )


def digests_of(adapter: str) -> list[str]:
    """Return the digest of each file of an adapter, given by its file, folder or Hub id."""
    path = Path(adapter).expanduser()
    if path.is_file():
        return [digest_file(path)]
    files = sorted(path for path in local_folder(str(path)).iterdir() if path.is_file())
    return list(map(digest_file, files))
