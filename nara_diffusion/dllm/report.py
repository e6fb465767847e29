"""What a fine-tuned language model's folder says about it: picture, samples, model card."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from nara_diffusion.dllm.measure import Measurement
from nara_diffusion.training.curves import plot_noise_level_curves
from nara_diffusion.training.report import format_table, write_model_card, write_samples

_SAMPLES = 40

_LOADING = """\
```python
from peft import PeftModel

import nara_diffusion
from nara_diffusion.dllm import generate, load_backbone
from nara_diffusion.dllm.data import encode_prompts, prompt_text

model, tokenizer = load_backbone({base!r})
model = PeftModel.from_pretrained(model, {folder!r})
prompt = torch.tensor(encode_prompts(tokenizer, [prompt_text(tokenizer, {instruction!r})]))
tokens = generate(model, prompt, gen_length={gen_length}, steps={steps}, block_length={block_length})
print(tokenizer.decode(tokens[0, prompt.shape[1] :], skip_special_tokens=True))
```

λ, the masked share of the answer, is given to the adapter by `generate` at each step."""


def results_table(before: Measurement, after: Measurement) -> str:
    """Exact match and validation loss, before and after, as text."""
    return format_table(
        ["", "before", "after"],
        [
            ["exact match", f"{100 * before.exact_match:.1f} %", f"{100 * after.exact_match:.1f} %"],
            ["validation loss", f"{before.validation_loss:.3f}", f"{after.validation_loss:.3f}"],
        ],
    )


def write_report(
    folder: Path, arguments: Mapping[str, Any], data: str, before: Measurement, after: Measurement
) -> None:
    """Writes noise_level_curve.png, samples.html and README.md into `folder`.

    Args:
        arguments: those of the run.
        data: what it was trained and tested on, in a sentence.
    """
    base = arguments["pretrained_model_name_or_path"]
    title = f"Loss over the noise level: {Path(base).name}, {data}"
    plot_noise_level_curves(
        folder / "noise_level_curve.png", after.noise_levels, before.curve, after.curve, title, "nats a masked token"
    )
    _write_samples(folder / "samples.html", before, after)
    _write_card(folder, arguments, data, before, after)
