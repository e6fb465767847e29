"""The report of a run: table, sheet of samples, curve and model card, in the run's folder."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL.Image import Image

from nara_diffusion.dreambooth.families.family import Family
from nara_diffusion.dreambooth.families.pipelines import absent_components
from nara_diffusion.dreambooth.families.table import family_of
from nara_diffusion.export.plain_lora import SCHEDULER
from nara_diffusion.noise.prediction import prediction_by
from nara_diffusion.training.arguments import schedule_of, window_of
from nara_diffusion.training.methods import method_of
from nara_diffusion.training.report import (
    core_import,
    format_table,
    needs_schedule,
    plot_noise_level_curves,
    reads_noise,
    schedule_note,
    write_run_card,
)

from .comparison import Measurement
from .samples import SampleSettings, write_grid, write_images

GRID = "samples.png"

_LOADING = """\
```python
import torch
from diffusers import {classes}
{imports}
pipe = {pipeline}.from_pretrained({base!r}, dtype={dtype}{absent})
{loading}
image = pipe(
    prompt={prompt!r},
    generator=torch.Generator().manual_seed({seed}),
    {call},
){picked}
image.save("sample.png")
```"""
_NAME = "subject"  # of a LoRA that needs a name
_IMPORTS = {
    "nara": "\nimport nara_diffusion  # gives pipelines load_nara_weights\n",
    "other": "from peft import PeftModel\n",
}
_NOISE = "\n\nThe adapter reads the noise level λ from the timestep of each step."


def results_table(before: Measurement, after: Measurement) -> str:
    """Similarity, alignment and validation loss, before and after, as text."""
    return format_table(["", "before", "after"], _figures(before, after))


def write_run_report(
    folder: Path,
    args: Any,
    facts: Mapping[str, str],
    settings: SampleSettings,
    before: Measurement,
    after: Measurement,
    references: Sequence[Image],
    load_from: str,
    pipe: Any,
    converted: Any = None,
) -> None:
    """Writes samples.png, samples-before, samples-after, noise_level_curve.png and README.md into `folder`.

    Args:
        args: the run's arguments.
        facts: {what: value} of the run for the card, such as the number of trainable parameters.
        settings: what was sampled.
        before, after: of the base model, and of the same after training.
        references: images of the subject.
        load_from: where the card says to load from, a path or a repository.
        pipe: the base model's pipeline.
        converted: the scheduler of the model that the base was converted to, if it was.
    """
    write_grid(folder / GRID, settings.prompts, {"before": before.images, "after": after.images}, references)
    for when, measured in (("before", before), ("after", after)):
        write_images(folder / f"samples-{when}", measured.images, settings)
    name, prompt = Path(args.pretrained_model_name_or_path).name, args.instance_prompt
    images = "training" if args.validation_data_dir is None else "held-out"
    plot_noise_level_curves(
        folder / "noise_level_curve.png",
        after.noise_levels,
        before.curve,
        after.curve,
        f"{name}: loss over the noise level, {images} images of the subject",
        "mean squared error",
        window_of(args),
    )
    ending = (
        f"Over {len(after.images)} samples of {len(settings.prompts)} prompts. Similarity is the mean cosine of "
        "samples and images of the subject, alignment that of samples and their prompts; figures of other encoders "
        "can't be compared. The loss at each noise level:\n\n![loss over the noise level](noise_level_curve.png)"
    )
    shown = zip(settings.prompts, settings.names[:: settings.images_per_prompt], strict=True)
    write_run_card(
        folder,
        args,
        facts,
        name=name,
        about=f"for `{args.pretrained_model_name_or_path}`{f', trained on images of “{prompt}”' if prompt else ''}.",
        figures=_figures(before, after),
        how_good=(f"![training images, and samples before and after]({GRID})", ending),
        loading=_loading(args, settings, load_from, pipe, converted),
        tags=["text-to-image", family_of(pipe).name, "diffusers", "dreambooth"],
        library="diffusers",
        instance_prompt=prompt,
        widget=[{"text": text, "output": {"url": f"samples-after/{name}"}} for text, name in shown],
    )


def window_note(args: Any, family: Family) -> str:
    """What is said at the end of a LoRA's run in a window; nothing of other runs."""
    return schedule_note(_schedule_line(args, family)) if needs_schedule(args) else ""


def _loading(args: Any, settings: SampleSettings, load_from: str, pipe: Any, converted: Any) -> str:
    """The card's code, and what has to be known of it."""
    dtype = {"fp16": "torch.float16", "bf16": "torch.bfloat16"}.get(args.mixed_precision, "torch.float32")
    method, family, classes = method_of(args).family, family_of(pipe), [type(pipe).__name__]
    imports, ending = _IMPORTS.get(method, ""), _NOISE if reads_noise(args) or needs_schedule(args) else ""
    if needs_schedule(args):
        lines = [f"pipe.load_lora_weights({load_from!r}, adapter_name={_NAME!r})", _schedule_line(args, family)]
        imports += "\nfrom nara_diffusion import StrengthSchedule\n"
    elif method in ("nara", "lora"):
        lines = [f"pipe.load_{method}_weights({load_from!r})"]
    else:  # PEFT changes the component itself; one that was trained whole is exchanged
        line = {
            "other": "PeftModel.from_pretrained(pipe.{0}, {1!r}, subfolder={0!r})",
            "full": "pipe.{0} = type(pipe.{0}).from_pretrained({1!r}, subfolder={0!r}, dtype={2})",
        }[method]
        trained = [family.denoiser, *(family.text_encoders if args.train_text_encoder else [])]
        lines = [line.format(name, load_from, dtype) for name in trained]
    if converted is not None:
        kind = type(converted).__name__
        how = "`load_nara_weights` sets the scheduler that it needs, and `unload_nara_weights` brings the old one back"
        if method != "nara":
            classes.append(kind)
            lines.append(f"pipe.scheduler = {kind}.from_pretrained({load_from!r}, subfolder={SCHEDULER!r})")
            how = "set the scheduler, as above, whenever the weights are loaded"
        ending += f"\n\nThe model now predicts {prediction_by(converted)} and is sampled by {kind}: {how}."
    call = family.sampling(dict(settings.call), 1)
    code = _LOADING.format(
        classes=", ".join(classes),
        pipeline=classes[0],
        absent="".join(f", {name}=None" for name in absent_components(pipe)),
        imports=imports,
        base=args.pretrained_model_name_or_path,
        dtype=dtype,
        loading=core_import(args) + "\n".join(lines),
        prompt=settings.prompts[0],
        seed=settings.seed,
        call=",\n    ".join(f"{name}={value!r}" for name, value in call.items()),
        picked=family.picked,
    )
    return code + ending


def _schedule_line(args: Any, family: Family) -> str:
    schedule = repr(schedule_of(args))
    if args.train_text_encoder:  # which runs before there is a λ
        parts = {family.denoiser: schedule, **dict.fromkeys(family.text_encoders, "1.0")}
        schedule = "{" + ", ".join(f"{name!r}: {value}" for name, value in parts.items()) + "}"
    return f"pipe.set_adapters({_NAME!r}, adapter_weights={schedule})"


def _figures(before: Measurement, after: Measurement) -> list[list[str]]:
    rows: list[tuple[str, float | None, float | None]] = [
        ("similarity to the subject", before.similarity, after.similarity),
        ("alignment with the prompt", before.text_alignment, after.text_alignment),
        ("validation loss", before.validation_loss, after.validation_loss),
    ]
    return [[name, *("not measured" if n is None else f"{n:.3f}" for n in numbers)] for name, *numbers in rows]
