"""What a subject's folder says about it: table, sheet of samples, curve, model card."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from PIL.Image import Image

from nara_diffusion.dreambooth.grid import write_grid
from nara_diffusion.dreambooth.measurement import Measurement
from nara_diffusion.dreambooth.pipelines import model_name
from nara_diffusion.dreambooth.sampling import SampleSettings, write_images
from nara_diffusion.training.curves import plot_noise_level_curves
from nara_diffusion.training.report import format_table, write_model_card

GRID = "samples.png"

_LOADING = """\
```python
import torch
from diffusers import StableDiffusionXLPipeline

import nara_diffusion  # gives pipelines load_nara_weights

pipe = StableDiffusionXLPipeline.from_pretrained({base!r}, dtype={dtype})
pipe.load_nara_weights({folder!r})
image = pipe(
    {prompt!r},
    generator=torch.Generator().manual_seed({seed}),
    {call},
).images[0]
image.save("sample.png")
```

The adapter reads the noise level λ from the timestep of each step."""


def results_table(before: Measurement, after: Measurement) -> str:
    """Similarity, alignment and validation loss, before and after, as text."""
    return format_table(["", "before", "after"], _figures(before, after))


def write_run_report(
    folder: Path,
    arguments: Mapping[str, Any],
    facts: Mapping[str, str],
    settings: SampleSettings,
    before: Measurement,
    after: Measurement,
    references: Sequence[Image],
    load_from: str,
) -> None:
    """Writes samples.png, samples-before, samples-after, noise_level_curve.png and README.md into `folder`.

    Args:
        arguments: those of the run.
        facts: {what: value} of the run for the card, such as the number of trainable parameters.
        settings: what was sampled.
        before, after: of the base model, and of the same with the adapter.
        references: images of the subject.
        load_from: where the card says to load the adapter from, a path or a repository.
    """
    write_grid(folder / GRID, settings.prompts, {"before": before.images, "after": after.images}, references)
    for name, measured in (("before", before), ("after", after)):
        write_images(folder / f"samples-{name}", measured.images, settings)
    name = model_name(arguments["pretrained_model_name_or_path"])
    held_out = arguments["validation_data_dir"] is not None
    plot_noise_level_curves(
        folder / "noise_level_curve.png",
        after.noise_levels,
        before.curve,
        after.curve,
        f"{name}: loss over the noise level, {'held-out' if held_out else 'training'} images of the subject",
        "mean squared error",
    )
    _write_card(folder, name, arguments, facts, settings, before, after, load_from)


def _write_card(
    folder: Path,
    name: str,
    arguments: Mapping[str, Any],
    facts: Mapping[str, str],
    settings: SampleSettings,
    before: Measurement,
    after: Measurement,
    load_from: str,
) -> None:
    kind = "NaRA-DoRA" if arguments["use_dora"] else "NaRA"
    rows = "\n".join(f"| {' | '.join(row)} |" for row in _figures(before, after))
    how_good = (
        f"![training images, and samples before and after]({GRID})\n\n"
        f"| | before | after |\n|---|---|---|\n{rows}\n\n"
        f"Over {len(after.images)} samples of {len(settings.prompts)} prompts. Similarity is the mean cosine of "
        "samples and images of the subject, alignment that of samples and their prompts; figures of other encoders "
        "can't be compared. The loss at each noise level:\n\n![loss over the noise level](noise_level_curve.png)"
    )
    training = "\n".join(f"- {what}: {value}" for what, value in facts.items())
    settings_text = yaml.safe_dump(dict(arguments), sort_keys=False, allow_unicode=True).strip()
    base, prompt = arguments["pretrained_model_name_or_path"], arguments["instance_prompt"]
    about = f"for `{base}`" + ("" if prompt is None else f", trained on images of “{prompt}”")
    write_model_card(
        folder,
        title=f"{name} with {kind}",
        summary=f"A noise-aware low-rank adapter ({kind}, arXiv 2605.29716) {about}.",
        base_model=base,
        tags=["nara", "text-to-image", "stable-diffusion-xl", "diffusers", "dreambooth"],
        sections={
            "How good it is": how_good,
            "How to load it": _loading(arguments, settings, load_from),
            "How it was trained": f"{training}\n\nAll arguments:\n\n```yaml\n{settings_text}\n```",
        },
        library="diffusers",
        instance_prompt=prompt,
    )


def _loading(arguments: Mapping[str, Any], settings: SampleSettings, load_from: str) -> str:
    dtypes = {"fp16": "torch.float16", "bf16": "torch.bfloat16"}
    return _LOADING.format(
        base=arguments["pretrained_model_name_or_path"],
        dtype=dtypes.get(arguments["mixed_precision"], "torch.float32"),
        folder=load_from,
        prompt=settings.prompts[0],
        seed=settings.seed,
        call=",\n    ".join(f"{name}={value!r}" for name, value in settings.call.items()),
    )


def _figures(before: Measurement, after: Measurement) -> list[list[str]]:
    rows = [
        ["similarity to the subject", before.similarity, after.similarity],
        ["alignment with the prompt", before.text_alignment, after.text_alignment],
        ["validation loss", before.validation_loss, after.validation_loss],
    ]
    return [[str(name), _number(old), _number(new)] for name, old, new in rows]


def _number(value: Any) -> str:
    return "not measured" if value is None else f"{value:.3f}"
