"""Looks at how C(λ) moves while NaRA is trained, to find out why it wins or doesn't.

    python examples/benchmarks/benchmark_core_movement.py

NaRA as published, with η = 1, with one core a layer, and NaRA-Knots are trained on one domain of the text benchmark.
Every few steps are noted: how far C(λ) is from I, how much of that depends on λ, its singular values, the gradients of
the core against those of A and B, and whether the layers pull at C in one direction (see quality/movement.py). The
record holds all of it, with command, hardware, versions and commit; the picture shows it over the steps. At rank 1 C is
one number; it is looked at where it is a matrix, at rank 4, unless --rank says otherwise.
"""

from __future__ import annotations

import argparse
import copy
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from benchmark_record import save_record
from matplotlib.figure import Figure
from quality.movement import look
from quality.text.methods import adapted
from quality.text.recipe import Recipe
from quality.text.runs import load_task
from quality.text.training import train
from tqdm.auto import tqdm

ARMS: dict[str, tuple[str, dict[str, Any]]] = {
    "NaRA": ("nara", {}),
    "NaRA, η = 1": ("nara", {"core_scale": 1.0}),
    "NaRA, a core a layer": ("nara", {"core_sharing": "layer"}),
    "NaRA-Knots": ("nara_knots", {"core_learning_rate": 1e-3}),
}
SHOWN = {
    "deviation": "‖C − I‖ / √r",
    "spread": "‖C − mean over λ‖ / √r",
    "gradient_core": "RMS gradient of the core",
    "agreement": "cosine of two layers' gradients at C",
}


def trace(backbone: str, domain: str, method: str, every: int, seed: int, **settings: Any) -> list[dict[str, Any]]:
    """One training; a look after the backward of every `every`-th step."""
    recipe = Recipe.of(**settings)
    task = load_task(backbone, domain)
    torch.manual_seed(seed)
    model = adapted(copy.deepcopy(task.model), method, recipe)
    looks: list[dict[str, Any]] = []
    with tqdm(total=recipe.steps, desc=method) as bar:

        def watch(step: int) -> None:
            bar.update()
            if step % every == 0 or step == 1:
                looks.append(look(model, step))

        train(model, task.data.train, recipe, seed, watch)
    return looks


def draw(traces: Mapping[str, Sequence[Mapping[str, Any]]], path: Path) -> None:
    """One panel a quantity, one line an arm."""
    figure = Figure(figsize=(3.6 * len(SHOWN), 3.4), layout="constrained")
    row = figure.subplots(1, len(SHOWN))
    for axes, (key, title) in zip(row, SHOWN.items(), strict=True):
        for number, (name, looks) in enumerate(traces.items()):
            points = [(item["step"], item[key]) for item in looks if item[key] is not None]
            if points:
                axes.plot(*zip(*points, strict=True), label=name, color=f"C{number}")
        axes.set(title=title, xlabel="step")
    handles, labels = row[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(labels), frameon=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110, metadata={"Software": None})


def main(
    backbone: str = "llada-tiny",
    domain: str = "commonsense",
    steps: int = 500,
    every: int = 10,
    seed: int = 0,
    rank: int = 4,
    learning_rate: float = 1e-2,
    core_learning_rate: float = 3e-4,
    output_dir: str | Path = "outputs/benchmarks",
) -> dict[str, Any]:
    """Trains the four, prints where each ended, writes record and picture; returns the figures."""
    shared = {"rank": rank, "steps": steps, "learning_rate": learning_rate, "core_learning_rate": core_learning_rate}
    traces = {
        name: trace(backbone, domain, method, every, seed, **shared | settings)
        for name, (method, settings) in ARMS.items()
    }
    for name, looks in traces.items():
        last = looks[-1]
        agreement = "" if last["agreement"] is None else f", agreement of layers {last['agreement']:.3f}"
        print(
            f"{name:22s} deviation {last['deviation']:.3f}, of it over λ {last['spread']:.3f}; singular values "
            f"{last['smallest_singular_value']:.2f} to {last['largest_singular_value']:.2f}; RMS gradient of core "
            f"{last['gradient_core']:.1e}, A {last['gradient_A']:.1e}, B {last['gradient_B']:.1e}{agreement}"
        )
    figures = {"backbone": backbone, "domain": domain, "seed": seed, **shared, "traces": traces}
    draw(traces, Path(output_dir) / "benchmark_core_movement.png")
    print(f"saved to {save_record('benchmark_core_movement', figures, output_dir)}")
    return figures


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backbone", default="llada-tiny", help="folder of examples/assets (default: llada-tiny)")
    parser.add_argument("--domain", default="commonsense", help="of the text benchmark (default: commonsense)")
    parser.add_argument("--steps", type=int, default=500, help="of each training (default: 500)")
    parser.add_argument("--every", type=int, default=10, help="steps between two looks (default: 10)")
    parser.add_argument("--seed", type=int, default=0, help="default: 0")
    parser.add_argument("--rank", type=int, default=4, help="r (default: 4)")
    parser.add_argument("--learning_rate", type=float, default=1e-2, help="of A and B (default: 1e-2, best at rank 4)")
    parser.add_argument("--core_learning_rate", type=float, default=3e-4, help="of F (default: 3e-4, likewise)")
    parser.add_argument("--output_dir", default="outputs/benchmarks", help="where record and picture go")
    main(**vars(parser.parse_args()))
