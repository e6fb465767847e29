"""The model card of sdxl-tiny and the files that it shows, written from the run's own figures."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from string import Template
from typing import Any

from tiny_curves import write_curve

from nara_diffusion.training.output.output_dir import write_json, write_text

from .evaluation import GUIDANCE, SHEET_PROMPTS

CARD_TEMPLATE = Path(__file__).with_name("sdxl_tiny_card.md")


def write_sdxl_card(folder: Path, arguments: Any, results: dict[str, Any], curves: dict[str, list[dict]]) -> None:
    """README.md, results.json and the two curves, in ``folder``; samples.png lies there already."""
    write_json(folder / "results.json", results)
    write_curve(folder / "vae_curve", curves["vae"], ("loss", "absolute", "squares", "edges"), "loss")
    write_curve(folder / "decoder_curve", curves["decoder"], ("loss", "absolute", "squares", "edges"), "loss")
    write_curve(folder / "unet_curve", curves["unet"], ("loss", "validation_loss"), "weighted noise error")
    samples, parts = results["samples"], results["parameters"]
    figures = asdict(arguments) | {
        "vae_million": f"{parts['vae'] / 1e6:.2f}",
        "unet_million": f"{parts['unet'] / 1e6:.2f}",
        "first_million": f"{parts['text_encoder'] / 1e6:.2f}",
        "second_million": f"{parts['text_encoder_2'] / 1e6:.2f}",
        "vae_minutes": results["minutes"]["vae"],
        "decoder_minutes": results["minutes"]["decoder"],
        "unet_minutes": results["minutes"]["unet"],
        "scaling_factor": results["scaling_factor"],
        "absolute_error": f"{results['reconstruction']['absolute_error']:.4f}",
        "psnr": f"{results['reconstruction']['psnr']:.1f}",
        "guidance": GUIDANCE,
        "sheet": "\n".join(f"{number}. {prompt}" for number, prompt in enumerate(SHEET_PROMPTS, start=1)),
        "prompts": samples["prompts"],
        "alignment": f"{samples['text_alignment']:.3f}",
        "alignment_rendered": f"{samples['text_alignment_of_renderings']:.3f}",
        "alignment_other": f"{samples['text_alignment_with_other_prompts']:.3f}",
        "nearest": f"{samples['own_prompt_is_nearest']:.0%}",
        "nearest_rendered": f"{samples['own_prompt_is_nearest_of_renderings']:.0%}",
    }
    write_text(folder / "README.md", Template(CARD_TEMPLATE.read_text(encoding="utf-8")).substitute(figures))
