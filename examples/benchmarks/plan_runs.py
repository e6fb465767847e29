"""Print docs/runs.md's table of what each file of train_scripts/configs needs: computed by --plan, not measured.

    python examples/benchmarks/plan_runs.py

The models' configurations are those of examples/assets/true_size; nothing is loaded. It takes some minutes.
"""

from __future__ import annotations

import contextlib
import io
from pathlib import Path
from typing import Any

from nara_diffusion.dllm import train as text
from nara_diffusion.dreambooth import train as images
from nara_diffusion.training.command import parse_arguments

ROOT = Path(__file__).parents[2]
CONFIGS = ROOT / "train_scripts" / "configs"
TRUE_SIZE = ROOT / "examples" / "assets" / "true_size"
MODELS = {"dream": "dream-7b", "flux": "flux.1-dev", "llada": "llada-8b", "sd3": "sd3.5-medium", "sdxl": "sdxl"}
COLUMNS = ("weights", "adapter", "optimizer", "activations", "peak")
HEAD = "| file | trained, M | weights, GB | adapter | optimizer | activations | peak | TFLOP a forward and backward |"


def plan(file: Path) -> dict[str, Any]:
    """Return the figures of one file's run, at the true size of its model."""
    words = ["--config", str(file), "--plan"]
    family = file.stem.partition("_")[0]
    if "tiny" not in file.stem:
        words += ["--pretrained_model_name_or_path", str(TRUE_SIZE / MODELS[family])]
    module: Any = text
    if family not in ("dream", "llada"):
        module = images
        words += ["--pretrained_vae_model_name_or_path", "none"]
    kind = images.DreamBoothArguments if module is images else text.Arguments
    with contextlib.redirect_stdout(io.StringIO()):
        return module.main(parse_arguments(kind, words, defaults=module.shipped_run))


def row(file: Path) -> str:
    """Return one file's row of the table."""
    figures = plan(file)
    sizes = " | ".join(f"{figures[name] / 1e9:.2f}" for name in COLUMNS)
    return f"| {file.stem} | {figures['trainable'] / 1e6:.2f} | {sizes} | {figures['flops'] / 1e12:.3g} |"


if __name__ == "__main__":
    print(HEAD)
    print("|---|" + "---:|" * HEAD.count("|", 2), flush=True)
    for path in sorted(CONFIGS.glob("*.yaml")):
        print(row(path), flush=True)
