"""The model card of llada-tiny or dream-tiny and the files that it shows, written from the run's own figures."""

from __future__ import annotations

from pathlib import Path
from string import Template
from typing import Any

from tiny_curves import write_curve

from .tasks import FAMILIES, LETTER_FAMILIES, questions

CURVE_FILE = "training_curve"


def write_card(directory: Path, arguments: dict[str, Any], results: dict[str, Any], curve: list[dict]) -> None:
    """training_curve.csv, training_curve.png and README.md, in ``directory``."""
    write_curve(
        directory / CURVE_FILE, curve, ("train_loss", "validation_loss"), "masked-diffusion loss (nats a token)"
    )
    (directory / "README.md").write_text(_card(arguments, results), encoding="utf-8")


def _family_rows(results: dict[str, Any]) -> str:
    rows = []
    for name in FAMILIES:
        question, answer = questions(name, 1, seed=2)[0]
        source = "own" if name in LETTER_FAMILIES else "reasoning_gym"
        rows.append(f"| {name} | {source} | `{question}` | `{answer}` | {results['exact_match'][name]:.2f} |")
    return "\n".join(rows)


def _card(arguments: dict[str, Any], results: dict[str, Any]) -> str:
    figures = arguments | {
        "million": f"{results['parameters'] / 1e6:.2f}",
        "minutes": f"{results['minutes']:.0f}",
        "decay_share": f"{arguments['decay_share']:.0%}",
        "validation_loss": f"{results['validation_loss']:.3f}",
        "families": _family_rows(results),
        "steps": results["steps"],
        "max_tokens": results["max_tokens"],
    }
    template = Path(__file__).with_name(f"{arguments['family']}_tiny_card.md")
    return Template(template.read_text(encoding="utf-8")).substitute(figures)
