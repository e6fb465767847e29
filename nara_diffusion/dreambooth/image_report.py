"""The report of a run: a table, a sheet of samples, a curve and the model card."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from diffusers.pipelines.pipeline_utils import DiffusionPipeline

from nara_diffusion.training.arguments import method_of, schedule_of
from nara_diffusion.training.report import core_import, needs_schedule, reads_noise
from nara_diffusion.tuner.usage import FewStepSampling
from nara_diffusion.utils.wording import counted

from .denoiser import EXPERT_LORAS
from .families import LOW, Family
from .fidelity import STRIP, Evaluation, Measurement
from .image_arguments import DreamBoothArguments, run_family
from .pipelines import family_of
from .samples import SampleSettings, write_grid, write_images

GRID = "samples.png"

_LOADING = """\
```python
import torch
from diffusers import {pipeline}
{imports}
pipe = {pipeline}.from_pretrained({base!r}, dtype={dtype}{options})
{loading}
image = pipe({image}
    prompt={prompt!r},
    generator=torch.Generator().manual_seed({seed}),
    {call},
){picked}
image.save("sample.png")
```"""
SUBJECT = "subject"
"""The name of an adapter that was trained on images, where it needs one."""
_IMPORTS = {
    "nara": "\nimport nara_diffusion  # gives pipelines load_nara_weights\n",
    "other": "from peft import PeftModel\n",
}
_LOST = 0.7  # alignment that remains when samples no longer follow prompts, as a share
_NEAR = 0.01  # a smaller rise of similarity counts as none
_NOISE = "\n\nThe adapter reads the noise level λ from the timestep of each step."


def write_samples(evaluation: Evaluation, before: Measurement, after: Measurement) -> None:
    """Write samples.png, and a folder samples-NAME for each of its columns."""
    folder, settings = evaluation.run.folder, evaluation.settings
    columns = {"before": before.images, "after": after.images}
    if evaluation.has_teacher:
        columns = {"teacher": evaluation.references, **columns}
        write_grid(folder / GRID, settings.prompts, columns)
    else:
        evaluation.write_sheet(folder / GRID, columns)
    for name, images in columns.items():
        write_images(folder / f"samples-{name}", images, settings)


def subject_card(evaluation: Evaluation, after: Measurement, data: str) -> dict[str, Any]:
    """Return the arguments of `write_card` for a run on images.

    Args:
        data: the training data, in words.
    """
    args, settings = evaluation.run.args, evaluation.settings
    samples = counted(len(after.images), "sample")
    prompts = counted(len(settings.prompts), "prompt")
    ending = (
        f"Over {samples} of {prompts}. Similarity is the mean cosine of samples and images of the "
        "subject. Alignment is the mean cosine of samples and their prompts. Figures of different encoders "
        "can't be compared. Alignment often falls a little while similarity rises. If samples no "
        "longer show what prompts ask for, train fewer steps, or use a strength below 1."
    )
    images, sheet = "images of the subject", "training images, and samples before and after"
    if evaluation.sources:
        ending = f"Over {samples}. Similarity is the mean cosine of each sample and its target."
        images, sheet = "pairs", "source, samples before and after, and target"
    source = "training" if args.validation_data_dir is None else "held-out"
    return {
        "measured_on": f"{source} {images}",
        "unit": "mean squared error",
        "about": f"for `{args.pretrained_model_name_or_path}`, trained on {data}.",
        "how_good": (f"![{sheet}]({GRID})", ending),
        "instance_prompt": args.instance_prompt,
        **_front_and_loading(evaluation, "dreambooth"),
    }


def student_card(
    evaluation: Evaluation, after: Measurement, sampling: FewStepSampling
) -> dict[str, Any]:
    """Return the arguments of `write_card` for a distillation."""
    base, steps = evaluation.run.args.pretrained_model_name_or_path, sampling.num_inference_steps
    ending = (
        f"Over {counted(len(after.images), 'sample')}, each compared with the teacher's of the same prompt and seed. "
        "The error of a step starts from the teacher's own latents and is a share of the base's without guidance."
    )
    return {
        "measured_on": "the teacher's held-out trajectories",
        "unit": "share of the base's error",
        "about": f"for `{base}`, which it teaches to sample in {counted(steps, 'step')} without guidance.",
        "how_good": (f"![the teacher, the base and the adapter]({GRID})", ending),
        "instance_prompt": evaluation.settings.prompts[0],
        **_front_and_loading(evaluation, "few-step", sampling.scheduler),
    }


def _front_and_loading(evaluation: Evaluation, tag: str, sampler: str = "") -> dict[str, Any]:
    """Return the fields of the card's front matter, and its code.

    Args:
        sampler: the code that sets the scheduler; empty if the pipeline's own will do.
    """
    run, settings, pipe = evaluation.run, evaluation.settings, evaluation.pipe
    widget, firsts = [], settings.names[:: settings.images_per_prompt]
    for text, name in zip(settings.prompts, firsts, strict=True):
        widget.append({"text": text, "output": {"url": f"samples-after/{name}"}})
    load_from = run.hub_id or str(run.folder)
    return {
        "loading": loading_code(run.args, settings, load_from, pipe, sampler),
        "tags": [
            "image-to-image" if evaluation.sources else "text-to-image",
            family_of(pipe).name,
            "diffusers",
            tag,
        ],
        "library": "diffusers",
        "widget": widget,
    }


def loading_code(
    args: DreamBoothArguments,
    settings: SampleSettings,
    load_from: str,
    pipe: DiffusionPipeline,
    sampler: str = "",
) -> str:
    """Return the code on the model card, with notes."""
    dtypes: dict[str | None, str] = {"fp16": "torch.float16", "bf16": "torch.bfloat16"}
    method, family = method_of(args).family, run_family(args, pipe)
    lines = _loading_lines(args, family, load_from)
    imports = _IMPORTS.get(method, "")
    if needs_schedule(args):
        imports += "\nfrom nara_diffusion import StrengthSchedule\n"
    image = ""
    if settings.by_prompt:
        imports = f"from diffusers.utils import load_image\n{imports}"
        source = settings.by_prompt[0]["image"]
        sources = 'load_image("source.png")'
        if isinstance(source, list):
            calls = [f'load_image("source-{i}.png")' for i in range(1, len(source) + 1)]
            sources = f"[{', '.join(calls)}]"
        image = f"\n    image={sources},"
    if sampler:
        lines.append(sampler)
        scheduler = sampler.removeprefix("pipe.scheduler = ").split(".")[0]
        imports = f"from diffusers import {scheduler}\n{imports}"
    # components that are None must be passed as None
    absent = [name for name, part in pipe.components.items() if part is None]
    options: dict[str, Any] = dict.fromkeys(sorted(set(absent) - set(pipe._optional_components)))
    for name in ("revision", "variant"):
        if getattr(args, name) is not None:
            options[name] = getattr(args, name)
    call = family.sampling(dict(settings.call), 1)
    code = _LOADING.format(
        pipeline=type(pipe).__name__,
        options="".join(f", {name}={value!r}" for name, value in options.items()),
        imports=imports,
        base=args.pretrained_model_name_or_path,
        dtype=dtypes.get(args.mixed_precision, "torch.float32"),
        loading=core_import(args) + "\n".join(lines),
        image=image,
        prompt=settings.prompts[0],
        seed=settings.seed,
        call=",\n    ".join(f"{name}={value!r}" for name, value in call.items()),
        picked=family.picked,
    )
    return code + (_NOISE if reads_noise(args) or needs_schedule(args) else "")


def _loading_lines(args: DreamBoothArguments, family: Family, load_from: str) -> list[str]:
    """Return the code that loads the adapter into `pipe`."""
    method = method_of(args).family
    if needs_schedule(args):
        loads = _lora_lines(load_from, family, f", adapter_name={SUBJECT!r}")
        return [*loads, schedule_line(args, family)]
    if method == "lora":
        return _lora_lines(load_from, family)
    if method == "nara":
        return [f"pipe.load_nara_weights({load_from!r})"]
    trained = [*family.trained]  # PEFT changes the component itself
    if args.train_text_encoder:
        trained += family.text_encoders
    return [
        f"PeftModel.from_pretrained(pipe.{name}, {load_from!r}, subfolder={name!r})"
        for name in trained
    ]


def _lora_lines(load_from: str, family: Family, name: str = "") -> list[str]:
    """Return the code that loads a LoRA; `name` has the argument for its name, if any."""
    if family.boundary is None:
        return [f"pipe.load_lora_weights({load_from!r}{name})"]
    lines = []
    for denoiser in family.trained:
        into = f", weight_name={EXPERT_LORAS[denoiser]!r}{name}"
        into += ", load_into_transformer_2=True" if denoiser == LOW else ""
        lines.append(f"pipe.load_lora_weights({load_from!r}{into})")
    return lines


def schedule_line(args: DreamBoothArguments, family: Family) -> str:
    """Return the code that gives a LoRA its strength over λ."""
    schedule = repr(schedule_of(args))
    if args.train_text_encoder:  # text encoders run before λ is known
        parts = {family.denoiser: schedule, **dict.fromkeys(family.text_encoders, "1.0")}
        schedule = "{" + ", ".join(f"{name!r}: {value}" for name, value in parts.items()) + "}"
    return f"pipe.set_adapters({SUBJECT!r}, adapter_weights={schedule})"


def forgetting(before: Measurement, after: Measurement) -> list[str]:
    """Return a warning if samples came nearer to the subject and lost much of their alignment."""
    start, end = before.text_alignment, after.text_alignment
    if start is None or end is None or before.similarity is None or after.similarity is None:
        return []
    if after.similarity <= before.similarity or end >= _LOST * start:
        return []
    return [
        f"The alignment with the prompt fell from {start:.2f} to {end:.2f} while the similarity rose: the samples "
        "show the subject, but no longer what else the prompts ask for. Train fewer steps (--max_train_steps); "
        f"{STRIP} and metrics.jsonl show where the alignment fell."
    ]


def best_by_both(trend: Sequence[tuple[int, float, float]]) -> list[str]:
    """Return a line if samples stopped coming nearer to the subject, and then lost alignment.

    Args:
        trend: (step, similarity, alignment) in the order of steps.
    """
    if not trend:
        return []
    highest = max(similarity for _, similarity, _ in trend)
    step, similarity, alignment = next(row for row in trend if row[1] > highest - _NEAR)
    _, last_similarity, last_alignment = trend[-1]
    if step == 0 or last_alignment >= alignment:
        return []
    return [
        f"After step {step} the similarity to the subject no longer rises ({similarity:.2f}, at the end "
        f"{last_similarity:.2f}), and the alignment with the prompt falls ({alignment:.2f}, at the end "
        f"{last_alignment:.2f}). Best by both: step {step}."
    ]


def figures(before: Measurement, after: Measurement, titles: Mapping[str, str]) -> list[list[str]]:
    """Return rows of (what, before, after) for {attribute of a measurement: what}."""
    table = []
    for name, title in titles.items():
        values = [getattr(measurement, name) for measurement in (before, after)]
        encoder = "alignment" if name == "text_alignment" else "similarity"
        missing = f"not measured (--{encoder}_model)"
        table.append([title, *(missing if x is None else f"{x:.3f}" for x in values)])
    return table
