"""Print docs/runs.md's table of what each file of train_scripts/configs needs: computed by --plan, not measured.

    python examples/benchmarks/plan_runs.py
    python examples/benchmarks/plan_runs.py --cards
    python examples/benchmarks/plan_runs.py --measure

The models' configurations are those of examples/assets/true_size; nothing is loaded. It takes some minutes. The second
command prints the table of cards in docs/dreambooth.md. The third takes one step of a random LLaDA of 154 million
parameters, and prints its resident memory beside the plan's.
"""

from __future__ import annotations

import contextlib
import io
import json
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
import yaml

from nara_diffusion.dllm import train as text
from nara_diffusion.dllm.models.pretrained import backbone_on_meta
from nara_diffusion.dreambooth import train as images
from nara_diffusion.training.run import start_run
from nara_flags.parser import parse_arguments

ROOT = Path(__file__).parents[2]
CONFIGS = ROOT / "train_scripts" / "configs"
ASSETS = ROOT / "examples" / "assets"
TEXT = {"diffusiongemma": "diffusiongemma-26b", "dream": "dream-7b", "llada": "llada-8b"}
MODELS = {**TEXT, "flux": "flux.1-dev", "sd3": "sd3.5-medium", "sdxl": "sdxl"}
COLUMNS = ("weights", "adapter", "optimizer", "activations", "peak")
HEAD = "| file | trained, M | weights, GB | adapter | optimizer | activations | peak | TFLOP per forward and backward |"
CARDS = [f.stem for f in sorted(CONFIGS.glob("*gb.yaml"))]
"""Files for cards of 12, 16 and 24 GB."""
TRUE_SIZE = {
    "black-forest-labs/FLUX.1-dev": "flux.1-dev",
    "black-forest-labs/FLUX.2-dev": "flux.2-dev",
    "black-forest-labs/FLUX.2-klein-base-4B": "flux.2-klein-4b",
    "Qwen/Qwen-Image": "qwen-image",
    "Wan-AI/Wan2.1-T2V-14B-Diffusers": "wan2.1-14b",
}
"""{model of a file for a card: folder of its configurations}."""
FILES = [
    f.stem for f in sorted(CONFIGS.glob("*.yaml")) if not {"tiny", "4"} & {*f.stem.split("_")} and f.stem not in CARDS
]
RUNS = [
    *FILES,
    "llada_instruct_math14k --load_in_8bit",
    "llada_instruct_math14k --load_in_4bit",
    "llada_instruct_math14k of llada-moe-7b",
    "llada_instruct_math14k of llada2-mini",
]
"""Files without those of tiny models, and without what --plan refuses; with further flags, or of another model."""


def planned(module: Any, words: list[str]) -> dict[str, Any]:
    """Return the figures of a run."""
    kind = images.DreamBoothArguments if module is images else text.Arguments
    with contextlib.redirect_stdout(io.StringIO()):
        return module.main(parse_arguments(kind, [*words, "--plan"], defaults=module.shipped_run))


def row(run: str) -> str:
    """Return one row of the table: that of a file, and of further flags, at the true size of its model."""
    called, _, other = run.partition(" of ")
    name, *flags = called.split()
    family = name.partition("_")[0]
    words = ["--config", str(CONFIGS / f"{name}.yaml"), *flags]
    words += ["--pretrained_model_name_or_path", str(ASSETS / "true_size" / (other or MODELS[family]))]
    module = text
    if family not in TEXT:
        module = images
        words += ["--pretrained_vae_model_name_or_path", "none"]
    figures = planned(module, words)
    sizes = " | ".join(f"{figures[name] / 1e9:.2f}" for name in COLUMNS)
    return f"| {run} | {figures['trainable'] / 1e6:.2f} | {sizes} | {figures['flops'] / 1e12:.3g} |"


def card_row(file: str) -> str:
    """Return the row of a file for a card: its model, flags that save memory, and the planned peak."""
    settings = yaml.safe_load((CONFIGS / f"{file}.yaml").read_text())
    model = settings["pretrained_model_name_or_path"]
    words = ["--config", str(CONFIGS / f"{file}.yaml")]
    words += ["--pretrained_model_name_or_path", str(ASSETS / "true_size" / TRUE_SIZE[model])]
    flags = [
        f"{flag} {settings[flag]}" for flag in ("block_swap", "train_batch_size", "resolution") if flag in settings
    ]
    flags = [f"load_in_{bits}bit" for bits in (4, 8) if settings.get(f"load_in_{bits}bit")] + flags
    peak = planned(images, words)["peak"] / 1e9
    return f"| {file} | {model} | {', '.join(flags)} | {peak:.1f} |"


# ---------------------------------------------------------------- a real run

SIZES = {"d_model": 1024, "n_layers": 12, "n_heads": 16, "n_kv_heads": 16, "mlp_hidden_size": 2816}


def measure(folder: Path) -> tuple[int, int]:
    """Return the planned bytes of a training step in float32, and the resident ones of a real step on the CPU.

    The latter are the process's highest in the training loop, less those before the model was loaded.
    """
    model = random_model(folder / "model")
    records = [json.dumps({"instruction": "a" * 100 + "c" * n, "output": "b" * 400}) for n in range(20)]
    (folder / "data.jsonl").write_text("\n".join(records))
    words = ["--pretrained_model_name_or_path", str(model), "--train_file", str(folder / "data.jsonl")]
    words += ["--max_length", "256", "--gen_length", "32", "--train_batch_size", "4", "--max_train_steps", "1"]
    words += ["--target_modules", "q_proj", "v_proj", "--validation_samples", "2", "--validation_steps", "none"]
    words += ["--checkpointing_steps", "none", "--output_dir", str(folder / "run")]
    figures = planned(text, words)
    seen: list[int] = []
    train = text.train

    def watched(*parts: Any) -> None:
        Path("/proc/self/clear_refs").write_text("5")  # the highest becomes the present
        train(*parts)
        seen.append(resident("VmHWM"))

    at_start = resident("VmRSS")
    text.train = watched
    with start_run(parse_arguments(text.Arguments, words), "run", text.write_checkpoint) as run:
        text.fine_tune(text.prepare(run.args, run))
    return figures["peak"], seen[0] - at_start


def random_model(folder: Path) -> Path:
    """Write a LLaDA of 154 million random parameters, with llada-tiny's tokenizer."""
    tiny = ASSETS / "llada-tiny"
    folder.mkdir()
    for file in tiny.glob("*.json"):
        shutil.copy(file, folder)
    fields = json.loads((tiny / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**fields, **SIZES, "max_sequence_length": 512}))
    planned_model = backbone_on_meta(str(folder), torch.float32)
    planned_model.config.mask_token_id = fields["mask_token_id"]
    type(planned_model)(planned_model.config).save_pretrained(folder)
    return folder


def resident(name: str) -> int:
    """Return a field of Linux' /proc/self/status in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(name)) * 1024


if __name__ == "__main__":
    if "--measure" in sys.argv:
        with tempfile.TemporaryDirectory() as place:
            plan, real = measure(Path(place))
        print(f"planned {plan / 1e9:.2f} GB, resident {real / 1e9:.2f} GB, ratio {plan / real:.2f}")
        raise SystemExit
    if "--cards" in sys.argv:
        for card in CARDS:
            print(card_row(card), flush=True)
        raise SystemExit
    print(HEAD)
    print("|---|" + "---:|" * (HEAD.count("|") - 2), flush=True)
    for name in RUNS:
        print(row(name), flush=True)
