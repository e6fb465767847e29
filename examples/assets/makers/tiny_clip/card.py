"""The model card of clip-tiny and the files that it shows, written from the run's own figures."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from string import Template
from typing import Any

from tiny_curves import write_curve
from tiny_drawings.scenes import contact_sheet, distinct_scenes, render

from nara_diffusion.training.output.output_dir import write_json, write_text

from .retrieval import SEED, SPLIT
from .vocabulary import MAX_TOKENS, words

CARD_TEMPLATE = Path(__file__).with_name("clip_tiny_card.md")


def write_clip_card(folder: Path, arguments: Any, results: dict[str, Any], curve: list[dict]) -> None:
    """README.md, results.json, training_curve.csv and .png, scenes.png, in ``folder``."""
    write_json(folder / "results.json", results)
    write_curve(folder / "training_curve", curve, ("loss",), "contrastive loss (nats)")
    shown = distinct_scenes(SPLIT, SEED, 16)
    contact_sheet([render(scene) for scene in shown], columns=8).save(folder / "scenes.png")
    measured = {name: f"{value:.3f}" for name, value in results["retrieval_among_64"].items()}
    retrieval = {name: f"{results['retrieval_among_64'][name]:.1%}" for name in ("image_to_text", "text_to_image")}
    figures = (
        asdict(arguments)
        | results
        | measured
        | retrieval
        | {
            "million": f"{results['parameters'] / 1e6:.2f}",
            "max_tokens": MAX_TOKENS,
            "words": len(words()),
            "captions": "\n".join(f"- {scene.caption}" for scene in shown[:4]),
        }
    )
    write_text(folder / "README.md", Template(CARD_TEMPLATE.read_text(encoding="utf-8")).substitute(figures))
