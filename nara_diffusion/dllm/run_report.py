"""What a fine-tuned language model's folder says about it: table, picture, samples, model card."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from nara_diffusion.dllm.measurement import Measurement
from nara_diffusion.training.curves import plot_noise_level_curves
from nara_diffusion.training.report import format_table, write_model_card, write_samples

SAMPLES = 40  # generations on the page

_LOADING = """\
```python
import torch
from peft import PeftModel

from nara_diffusion.dllm import encode_prompts, generate, load_backbone, prompt_text

model, tokenizer = load_backbone({base!r})
model = PeftModel.from_pretrained(model, {folder!r})
prompt = torch.tensor(encode_prompts(tokenizer, [prompt_text(tokenizer, {instruction!r})]))
tokens = generate(model, prompt, gen_length={gen_length}, steps={steps}, block_length={block_length})
print(tokenizer.decode(tokens[0, prompt.shape[1] :], skip_special_tokens=True))
```

`generate` tells the adapter λ, the masked share of the answer, at each step."""


def results_table(before: Measurement, after: Measurement) -> str:
    """Exact match and validation loss, before and after, as text."""
    return format_table(
        ["", "before", "after"],
        [
            [f"exact match (n = {len(after.generations)})", _percent(before), _percent(after)],
            ["validation loss", f"{before.validation_loss:.3f}", f"{after.validation_loss:.3f}"],
        ],
    )


def write_run_report(
    folder: Path,
    arguments: Mapping[str, Any],
    facts: Mapping[str, str],
    before: Measurement,
    after: Measurement,
    load_from: str,
) -> None:
    """Writes noise_level_curve.png, samples.html and README.md into `folder`.

    Args:
        arguments: those of the run.
        facts: {what: value} of the run for the card, such as the number of trainable parameters.
        before, after: of the base model, and of the same with the adapter.
        load_from: where the card says to load the adapter from, a path or a repository.
    """
    name = Path(arguments["pretrained_model_name_or_path"]).name
    plot_noise_level_curves(
        folder / "noise_level_curve.png",
        after.noise_levels,
        before.curve,
        after.curve,
        f"{name}: loss over the noise level, held-out records",
        "nats per masked token",
    )
    rows = [
        [
            (old["instruction"], None),
            (old["answer"], None),
            (old["generation"], old["correct"]),
            (new["generation"], new["correct"]),
        ]
        for old, new in zip(before.generations[:SAMPLES], after.generations[:SAMPLES], strict=True)
    ]
    write_samples(folder / "samples.html", f"{name}: samples", ["question", "answer", "before", "after"], rows)
    _write_card(folder, name, arguments, facts, before, after, load_from)


def _write_card(
    folder: Path,
    name: str,
    arguments: Mapping[str, Any],
    facts: Mapping[str, str],
    before: Measurement,
    after: Measurement,
    load_from: str,
) -> None:
    data = arguments["dataset_name"] or arguments["train_file"]
    kind = "NaRA-DoRA" if arguments["use_dora"] else "NaRA"
    how_good = (
        f"| | before | after |\n|---|---|---|\n"
        f"| exact match on {len(after.generations)} held-out records | {_percent(before)} | {_percent(after)} |\n"
        f"| validation loss | {before.validation_loss:.3f} | {after.validation_loss:.3f} |\n\n"
        "Exact match compares generated answers. [Samples](samples.html). The loss at each noise level:\n\n"
        "![loss over the noise level](noise_level_curve.png)"
    )
    loading = _LOADING.format(
        base=arguments["pretrained_model_name_or_path"],
        folder=load_from,
        instruction=after.generations[0]["instruction"],
        gen_length=arguments["gen_length"],
        steps=arguments["generation_steps"],
        block_length=arguments["block_length"],
    )
    training = "\n".join(f"- {what}: {value}" for what, value in facts.items())
    settings = yaml.safe_dump(dict(arguments), sort_keys=False).strip()
    write_model_card(
        folder,
        title=f"{name} with {kind}",
        summary=f"A noise-aware low-rank adapter ({kind}, arXiv 2605.29716) for the masked-diffusion language model "
        f"`{arguments['pretrained_model_name_or_path']}`, trained on `{data}`.",
        base_model=arguments["pretrained_model_name_or_path"],
        tags=["masked-diffusion", "text-generation"],
        sections={
            "How good it is": how_good,
            "How to load it": loading,
            "How it was trained": f"{training}\n\nAll arguments:\n\n```yaml\n{settings}\n```",
        },
    )


def _percent(measurement: Measurement) -> str:
    return f"{100 * measurement.exact_match:.1f} %"
