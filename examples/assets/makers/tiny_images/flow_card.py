"""The model card of sd-tiny-flow and the files that it shows, written from the run's own figures."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from string import Template
from typing import Any

from tiny_curves import write_curve

from nara_diffusion.training.output.output_dir import write_json, write_text

from .evaluation import GUIDANCE, SHEET_PROMPTS

CARD_TEMPLATE = Path(__file__).with_name("sd_tiny_flow_card.md")


def write_flow_card(folder: Path, arguments: Any, results: dict[str, Any], curve: list[dict]) -> None:
    """README.md, results.json and the curve, in ``folder``; samples.png lies there already."""
    write_json(folder / "results.json", results)
    write_curve(folder / "transformer_curve", curve, ("loss", "validation_loss"), "squared error of ε − z")
    samples, parts = results["samples"], results["parameters"]
    sibling = json.loads((arguments.sdxl / "results.json").read_text(encoding="utf-8"))["samples"]
    figures = asdict(arguments) | {
        "width": 32 * arguments.heads,
        "transformer_million": f"{parts['transformer'] / 1e6:.2f}",
        "vae_million": f"{parts['vae'] / 1e6:.2f}",
        "first_million": f"{parts['text_encoder'] / 1e6:.2f}",
        "second_million": f"{parts['text_encoder_2'] / 1e6:.2f}",
        "minutes": results["minutes"],
        "scaling_factor": results["scaling_factor"],
        "shift_factor": results["shift_factor"],
        "validation_loss": f"{results['validation_loss']:.3f}",
        "padding_difference": f"{results['padding_difference']:.3f}",
        "guidance": GUIDANCE,
        "sheet": "\n".join(f"{number}. {prompt}" for number, prompt in enumerate(SHEET_PROMPTS, start=1)),
        "prompts": samples["prompts"],
        "alignment_rendered": f"{samples['text_alignment_of_renderings']:.3f}",
        "nearest_rendered": f"{samples['own_prompt_is_nearest_of_renderings']:.0%}",
    }
    for suffix, measured in (("", samples), ("_sdxl", sibling)):
        figures |= {
            f"alignment{suffix}": f"{measured['text_alignment']:.3f}",
            f"alignment_other{suffix}": f"{measured['text_alignment_with_other_prompts']:.3f}",
            f"nearest{suffix}": f"{measured['own_prompt_is_nearest']:.0%}",
        }
    write_text(folder / "README.md", Template(CARD_TEMPLATE.read_text(encoding="utf-8")).substitute(figures))
