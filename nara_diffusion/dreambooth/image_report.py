"""The report of a run: table, sheet of samples, curve and model card, in the run's folder."""

from __future__ import annotations

from typing import Any

from nara_diffusion.training.adapters import method_of
from nara_diffusion.training.arguments import schedule_of
from nara_diffusion.training.report import core_import, needs_schedule, reads_noise
from nara_diffusion.utils.naming import counted

from .family import Family
from .fidelity import Evaluation, Measurement
from .pipelines import family_of
from .samples import SampleSettings, write_grid, write_images

GRID = "samples.png"

_LOADING = """\
```python
import torch
from diffusers import {pipeline}
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
_NAME = "subject"  # the name of a LoRA that needs one
_IMPORTS = {
    "nara": "\nimport nara_diffusion  # gives pipelines load_nara_weights\n",
    "other": "from peft import PeftModel\n",
}
_NOISE = "\n\nThe adapter reads the noise level λ from the timestep of each step."


def describe(
    evaluation: Evaluation, before: Measurement, after: Measurement, pipe: Any, data: str
) -> dict[str, Any]:
    """Write samples.png, samples-before and samples-after. Return the model card's arguments.

    Args:
        data: the training data, in words.
    """
    run, settings = evaluation.run, evaluation.settings
    folder, args = run.folder, run.args
    columns = {"before": before.images, "after": after.images}
    write_grid(folder / GRID, settings.prompts, columns, evaluation.subject)
    for when, images in columns.items():
        write_images(folder / f"samples-{when}", images, settings)
    ending = (
        f"Over {counted(len(after.images), 'sample')} of {counted(len(settings.prompts), 'prompt')}. Similarity is "
        "the mean cosine of samples and images of the subject, as they are and as the model's autoencoder shows them "
        "(encoded and decoded); alignment is that of samples and their prompts. Figures of other encoders can't be "
        "compared. Alignment often falls a little while similarity rises; where samples no "
        "longer show what prompts ask for, take an earlier checkpoint, or a strength below 1."
    )
    shown = zip(settings.prompts, settings.names[:: settings.images_per_prompt], strict=True)
    return {
        "measured_on": f"{'training' if args.validation_data_dir is None else 'held-out'} images of the subject",
        "unit": "mean squared error",
        "about": f"for `{args.pretrained_model_name_or_path}`, trained on {data}.",
        "how_good": (f"![training images, and samples before and after]({GRID})", ending),
        "loading": _loading(args, settings, run.hub_id or str(folder), pipe),
        "tags": ["text-to-image", family_of(pipe).name, "diffusers", "dreambooth"],
        "library": "diffusers",
        "instance_prompt": args.instance_prompt,
        "widget": [
            {"text": text, "output": {"url": f"samples-after/{name}"}} for text, name in shown
        ],
    }


def _loading(args: Any, settings: SampleSettings, load_from: str, pipe: Any) -> str:
    """Return the card's code, and notes on it."""
    dtype = {"fp16": "torch.float16", "bf16": "torch.bfloat16"}.get(
        args.mixed_precision, "torch.float32"
    )
    method, family = method_of(args).family, family_of(pipe)
    imports, ending = (
        _IMPORTS.get(method, ""),
        _NOISE if reads_noise(args) or needs_schedule(args) else "",
    )
    if needs_schedule(args):
        lines = [
            f"pipe.load_lora_weights({load_from!r}, adapter_name={_NAME!r})",
            schedule_line(args, family),
        ]
        imports += "\nfrom nara_diffusion import StrengthSchedule\n"
    elif method in ("nara", "lora"):
        lines = [f"pipe.load_{method}_weights({load_from!r})"]
    else:  # PEFT changes the component itself
        trained = [family.denoiser, *(family.text_encoders if args.train_text_encoder else [])]
        lines = [
            f"PeftModel.from_pretrained(pipe.{name}, {load_from!r}, subfolder={name!r})"
            for name in trained
        ]
    # components that are None must be passed as None
    absent = {name for name, part in pipe.components.items() if part is None} - set(
        pipe._optional_components
    )
    call = family.sampling(dict(settings.call), 1)
    code = _LOADING.format(
        pipeline=type(pipe).__name__,
        absent="".join(f", {name}=None" for name in sorted(absent)),
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


def schedule_line(args: Any, family: Family) -> str:
    """Return the code that gives a LoRA its strength over λ."""
    schedule = repr(schedule_of(args))
    if args.train_text_encoder:  # text encoders run before λ is known
        parts = {family.denoiser: schedule, **dict.fromkeys(family.text_encoders, "1.0")}
        schedule = "{" + ", ".join(f"{name!r}: {value}" for name, value in parts.items()) + "}"
    return f"pipe.set_adapters({_NAME!r}, adapter_weights={schedule})"


def figures(before: Measurement, after: Measurement) -> list[list[str]]:
    """Return rows of (what, before, after) for similarity, alignment and validation loss."""
    rows = {
        "similarity to the subject": (before.similarity, after.similarity, "similarity_model"),
        "similarity to it as the autoencoder shows it": (
            before.similarity_as_shown,
            after.similarity_as_shown,
            "similarity_model",
        ),
        "alignment with the prompt": (
            before.text_alignment,
            after.text_alignment,
            "alignment_model",
        ),
        "validation loss": (before.validation_loss, after.validation_loss, ""),
    }
    written = lambda value, flag: f"not measured (--{flag})" if value is None else f"{value:.3f}"  # noqa: E731
    return [
        [name, *(written(value, flag) for value in values)]
        for name, (*values, flag) in rows.items()
    ]
