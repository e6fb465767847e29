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
from nara_diffusion.noise.prediction import TIMESTEP_SETTINGS
from nara_diffusion.training.adapters import adapter_config, check_target_modules, title_of
from nara_diffusion.training.checkpoints import save_adapter
from nara_diffusion.training.loop import prepare_training, train
from nara_diffusion.training.report import finish
from nara_diffusion.training.run import Run
from nara_diffusion.utils.files import digest_texts

from .caches import PromptCache
from .denoiser import AdaptedDenoiser, read_checkpoint, write_adapter
from .encoders import load_encoders
from .few_steps import check_family, levels_of, sampler_line, sampler_of
from .image_arguments import DreamBoothArguments, run_family
from .image_report import describe_student
from .objectives import build_objective
from .pipelines import folders_of, load_pipeline, sharing_pipeline
from .samples import SampleSettings, sample_images
from .student import StepErrors, StudentEvaluation, StudentLoss, contents_of, load_own
from .trajectories import (
    Segments,
    Teacher,
    collate_segments,
    make_trajectories,
    read_prompts,
)

TRAJECTORIES = "trajectories"
OWN = "own"
"""The name of the user's adapter (--init_adapter) in both pipelines."""


class Distillation:
    """A run of `--distill_to`. Call `train`, then `report`."""

    def __init__(self, args: DreamBoothArguments, run: Run) -> None:
        self.args, self.run = args, run
        check_family(run_family(args))  # before the model is loaded
        self.prompts = self._prompts()
        device = run.accelerator.device
        self.encoders = load_encoders(args, device)
        name, vae = args.pretrained_model_name_or_path, args.pretrained_vae_model_name_or_path
        files: Any = {"vae_name": vae, "revision": args.revision}
        self.pipe = load_pipeline(name, dtype=run.dtype, variant=args.variant, **files).to(device)
        run.record_base_digests(folders_of(self.pipe, name, **files), args.variant)
        self.family = run_family(args, self.pipe)
        self.objective = build_objective(self.pipe.scheduler, shift=args.flow_shift)
        self.sampler = sampler_of(self.pipe.scheduler, self.objective, self.steps)
        self.levels = levels_of(self.sampler, self.objective, self.steps)
        self.config = self._config()
        check_target_modules(
            getattr(self.pipe, self.family.denoiser), getattr(self.config, "target_modules", None)
        )
        self.sampling_pipe = sharing_pipeline(self.pipe, run.dtype)
        self.sampling_pipe.scheduler = self.sampler
        if args.init_adapter is not None:
            load_own(self.pipe, args.init_adapter, OWN)
            load_own(self.sampling_pipe, args.init_adapter, OWN)

    @property
    def steps(self) -> int:
        """K."""
        assert self.args.distill_to is not None
        return self.args.distill_to

    @property
    def beside(self) -> str | None:
        """The name of the user's adapter; None without a user's adapter."""
        return None if self.args.init_adapter is None else OWN

    @property
    def parts(self) -> int:
        """The number of teacher steps for one student step."""
        return self.args.num_inference_steps // self.steps

    @property
    def sampler_line(self) -> str:
        """The code that sets the student's scheduler in a pipeline of the base."""
        return sampler_line(self.pipe.scheduler, self.objective, self.steps)

    def _config(self) -> Any:
        config: Any = adapter_config(self.args, noise_convention=self.objective.source.convention)
        if isinstance(config, NaraConfig):
            config.few_steps = {
                "num_inference_steps": self.steps,
                "guidance_scale": 1.0,
                "timesteps": [level.timestep for level in self.levels[:-1]],
                "scheduler": self.sampler_line,
                **{name: self.sampler.config.get(name) for name in TIMESTEP_SETTINGS},
            }
        return config

    # ------------------------------------------------------------------ data

    def _prompts(self) -> list[str]:
        """Return one prompt for each trajectory."""
        args = self.args
        if args.prompts_file is not None:
            known = read_prompts(args.prompts_file)
        else:
            known = [prompt for prompt in (args.instance_prompt, args.class_prompt) if prompt]
        return [known[i % len(known)] for i in range(args.trajectories)]

    def _trajectories(self, teacher: Teacher, prompts: Sequence[str]) -> Tensor:
        args, run = self.args, self.run
        settings = (args.seed, args.resolution, args.num_inference_steps, self.steps)
        settings += (args.guidance_scale, args.max_sequence_length, args.flow_shift, run.dtype)
        fine = levels_of(self.sampler, self.objective, self.steps, self.parts)
        texts = [*prompts, *map(str, (*settings, *fine)), *run.digests.values()]
        texts += contents_of(self.pipe, OWN)
        digest = digest_texts(texts)
        run.record_data_digest("training data", [digest])
        folder = run.folder / TRAJECTORIES
        if args.trajectories_dir is not None:
            folder = Path(args.trajectories_dir).expanduser()
        path = folder / f"{digest[:16]}.safetensors"
        return make_trajectories(
            teacher, prompts, fine, self.parts, args.seed, path, run.accelerator
        )

    def _losses(self) -> tuple[StudentLoss, StepErrors]:
        """Return the loss on training trajectories and the errors on held-out trajectories."""
        args, accelerator = self.args, self.run.accelerator
        prompts = self.prompts
        teacher = Teacher(
            self.pipe, self.family, args.guidance_scale, args.resolution, args.sample_batch_size
        )
        trajectories = self._trajectories(teacher, prompts)
        count = max(1, args.trajectories // 10)
        held_out = StudentLoss(
            getattr(self.pipe, self.family.denoiser),
            trajectories[-count:],
            prompts[-count:],
            self.levels,
            torch.ones(self.steps),
            self.objective.source,
            PromptCache(self.pipe, self.family),
            teacher,
        )
        base = StepErrors(held_out, args.sample_batch_size).errors(self.pipe, accelerator).mean(1)
        held_out = replace(held_out, base_errors=base)
        loss = replace(held_out, trajectories=trajectories[:-count], prompts=prompts[:-count])
        return loss, StepErrors(held_out, args.sample_batch_size)

    # ------------------------------------------------------------------ the run

    def train(self) -> None:
        """Train from the start or a checkpoint to the last step, and write the adapter."""
        args, run = self.args, self.run
        loss, self.errors = self._losses()
        samples = Segments(len(loss.prompts), self.steps, args.seed)
        steps = run.plan(len(loss.prompts) * self.steps)
        self.evaluation = self._evaluation(loss.prompts)
        model = self._model()
        parts = prepare_training(run, model, samples, collate_segments)
        self.trainable = sum(parameter.numel() for parameter in model.trained.values())
        teacher = f"{args.num_inference_steps} steps, guidance {args.guidance_scale:g}"
        self.facts = {
            "base": f"{args.pretrained_model_name_or_path} at {args.resolution} pixels",
            "adapter": title_of(args),
            "student": f"{self.steps} steps without guidance, one call each",
            "teacher": teacher + (f", with {args.init_adapter}" if args.init_adapter else ""),
            "trained on": f"{len(loss.prompts)} trajectories of the teacher",
            "validation loss": f"on {len(self.errors.loss.prompts)} trajectories held out",
            "optimizer steps": f"{steps} of {run.global_batch} samples",
            "trainable parameters": f"{self.trainable:,}",
            "hardware": run.hardware,
        }
        run.open(self.facts)
        run.restore()
        validate = partial(self.evaluation.validate, parts[0])
        train(run, parts, replace(loss, model=parts[0]), validate)
        save_adapter(run.accelerator, parts[0], run.folder, write_adapter)

    def _evaluation(self, prompts: Sequence[str]) -> StudentEvaluation:
        args = self.args
        shown = args.prompts or list(dict.fromkeys(prompts))[:4]
        size = {"height": args.resolution, "width": args.resolution, **self.family.sample_call}
        student = {"num_inference_steps": self.steps, "guidance_scale": 1.0}
        settings = SampleSettings(
            shown, args.num_validation_images, args.seed, args.sample_batch_size, size | student
        )
        teacher = {
            "num_inference_steps": args.num_inference_steps,
            "guidance_scale": args.guidance_scale,
        }
        slow = replace(settings, call=size | teacher)
        images = sample_images(self.sampling_pipe, slow, self.run.accelerator, desc="teacher")
        return StudentEvaluation(
            self.run,
            self.sampling_pipe,
            settings,
            self.errors,
            images,
            similarity=self.encoders["similarity"],
            alignment=self.encoders["alignment"],
            beside=self.beside,
        )

    def _model(self) -> AdaptedDenoiser:
        args, checkpoint = self.args, self.run.checkpoint
        model = AdaptedDenoiser(
            self.pipe,
            self.config,
            gradient_checkpointing=args.gradient_checkpointing,
            family=self.family,
            beside=self.beside,
        )
        if checkpoint is not None:
            read_checkpoint(model, checkpoint)
        return model

    def report(self) -> dict[str, Any]:
        """Measure, write the report, and return the content of results.json."""
        args, run = self.args, self.run
        before = self.evaluation.measure(None, "before")
        after = self.evaluation.measure(run.folder, "after")
        ends = []
        for folder in (None, run.folder):
            with self.evaluation.loaded(folder):
                ends.append(self.errors.end_error(self.sampling_pipe))
        figures = [
            ["error of a step, share of the base's", before.validation_loss, after.validation_loss],
            ["distance of the end from the teacher's", *ends],
            ["similarity to the teacher's samples", before.similarity, after.similarity],
            ["alignment with the prompt", before.text_alignment, after.text_alignment],
        ]
        return finish(
            run,
            before,
            after,
            names=("similarity", "text_alignment", "validation_loss", "curve"),
            figures=[[str(name), *map(written, values)] for name, *values in figures],
            facts=self.facts,
            schedule_line="",
            describe=partial(
                describe_student,
                self.evaluation,
                before,
                after,
                self.pipe,
                self.sampler_line,
            ),
            n=len(after.images),
            trainable_parameters=self.trainable,
            base_model=args.pretrained_model_name_or_path,
            resolution=args.resolution,
            distill_to=self.steps,
            end_error_before=ends[0],
            end_error_after=ends[1],
        )


def written(value: Any) -> str:
    """Return a figure as text."""
    return "not measured" if value is None else f"{value:.3f}"
