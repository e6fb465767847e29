"""Processor time of dreambooth_sdxl.py from start to files, beside Diffusers' train_dreambooth_lora_sdxl.py.

    python examples/benchmarks/benchmark_start_up.py --script train_dreambooth_lora_sdxl.py
    python examples/benchmarks/benchmark_start_up.py --script … --channels 224 --train_batch_size 1 \\
        --few_steps 4 --steps 24 --options "--validation_steps none --curve_points 1 --num_inference_steps 1 \\
        --num_validation_images 1"

Get their script from examples/dreambooth of huggingface/diffusers, at the tag of the installed version. Both programs
train rank 16 on the same four projections of each attention layer, in float32, with the same images, batch and steps.
Ours trains a NaRA, caches latents, and makes its samples and curves at the default times; theirs trains a LoRA without
samples. Each round runs both programs at `few_steps` and at `steps` in a random order, as processes of one thread. Per
step is the difference of the two lengths; start and end is what remains. Ours takes as many samples in both. A first
round, not counted, lets Python write its bytecode files.
"""

from __future__ import annotations

import os
import resource
import shlex
import shutil
import statistics
import subprocess
import sys
import tempfile
from functools import partial
from pathlib import Path
from typing import Any

from benchmark_record import ROOT, median_ratio, run_command, save_record, times_in_turn
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
from diffusers.pipelines.stable_diffusion_xl.pipeline_stable_diffusion_xl import StableDiffusionXLPipeline

OURS = ROOT / "train_scripts" / "dreambooth_sdxl.py"
TARGETS = ("to_k", "to_q", "to_v", "to_out.0")  # those of their script
PROGRAMS = ("ours", "theirs")


def processor_time() -> float:
    """Seconds of all processes that this one has waited for."""
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def widen(base: str, channels: int, folder: Path) -> int:
    """Save `base` with a new UNet of channels, 2 and 4 times as many; return its parameters."""
    pipe = StableDiffusionXLPipeline.from_pretrained(base)
    widths = {"block_out_channels": [channels, 2 * channels, 4 * channels], "attention_head_dim": 8}
    config = {**pipe.unet.config, **widths}
    unet: Any = UNet2DConditionModel.from_config(config)
    pipe.register_modules(unet=unet)
    pipe.save_pretrained(folder)
    return unet.num_parameters()


def run(command: list[str], output: Path) -> None:
    """Run a program that writes to `output`, from the project's folder, and delete what it wrote."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    environment.pop("PYTHONDONTWRITEBYTECODE", None)
    program = [sys.executable, *command, "--output_dir", str(output)]
    result = subprocess.run(program, cwd=ROOT, env=environment, capture_output=True, text=True)
    if result.returncode:
        raise RuntimeError(f"{command[0]} failed:\n{result.stderr[-2000:]}")
    shutil.rmtree(output)


def figures_of(times: dict[str, list[float]], few_steps: int, steps: int) -> dict[str, Any]:
    """Medians of the seconds and of the rounds' ratios, from {"ours" or "theirs", a space, steps: seconds}."""
    seconds: dict[str, Any] = {}
    per_step, start_and_end = {}, {}
    for name in PROGRAMS:
        few, many = times[f"{name} {few_steps}"], times[f"{name} {steps}"]
        per_step[name] = [(b - a) / (steps - few_steps) for a, b in zip(few, many, strict=True)]
        rest = zip(few, per_step[name], strict=True)
        start_and_end[name] = [a - few_steps * step for a, step in rest]
    whole = {name: times[f"{name} {steps}"] for name in PROGRAMS}
    parts = {"whole": whole, "per step": per_step, "start and end": start_and_end}
    ratios: dict[str, Any] = {}
    for part, by_program in parts.items():
        seconds[part] = {name: statistics.median(values) for name, values in by_program.items()}
        ours, theirs = by_program["ours"], by_program["theirs"]
        ratios[part] = {
            "median": median_ratio(ours, theirs),
            "rounds": [a / b for a, b in zip(ours, theirs, strict=True)],
        }
    return {"seconds": seconds, "ratios": ratios, "times": times}


def main(
    script: str = "",
    base: str = "examples/assets/sdxl-tiny",
    images: str = "examples/assets/subject",
    channels: int = 0,
    resolution: int = 64,
    train_batch_size: int = 5,
    few_steps: int = 10,
    steps: int = 100,
    rounds: int = 5,
    options: str = "",
    output_dir: str = "outputs/benchmarks",
) -> dict[str, Any]:
    """Run both programs; print and save the figures. `options` are further flags of ours."""
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        (place / "images").mkdir()
        for image in (ROOT / images).glob("*.png"):
            shutil.copy(image, place / "images")
        model, parameters = str(ROOT / base), None
        if channels:
            parameters = widen(model, channels, place / "wide")
            model = str(place / "wide")
        settings = {
            "pretrained_model_name_or_path": model,
            "instance_data_dir": place / "images",
            "instance_prompt": "a photo of sks toy",
            "resolution": resolution,
            "rank": 16,
            "train_batch_size": train_batch_size,
            "learning_rate": 2e-3,
            "lr_warmup_steps": 0,
            "seed": 0,
        }
        shared = [word for name, value in settings.items() for word in (f"--{name}", str(value))]
        commands = {
            "ours": [str(OURS), *shared, "--target_modules", *TARGETS, *shlex.split(options)],
            "theirs": [str(Path(script).resolve()), *shared],
        }
        arms: dict[str, Any] = {}
        for name, command in commands.items():
            for number in (few_steps, steps):
                words = [*command, "--max_train_steps", str(number)]
                arms[f"{name} {number}"] = partial(run, words, place / "output")
        times = times_in_turn(arms, rounds, processor_time)
    figures = {"base": base, "parameters": parameters, "options": options}
    figures |= {"train_batch_size": train_batch_size, "rounds": rounds}
    figures |= figures_of(times, few_steps, steps)
    for part, ratio in figures["ratios"].items():
        ours, theirs = figures["seconds"][part].values()
        spread = f"{min(ratio['rounds']):.2f} to {max(ratio['rounds']):.2f}"
        print(f"{part:14s} ours {ours:7.3f} s, theirs {theirs:7.3f} s: {ratio['median']:.2f} ({spread})")
    name = "benchmark_start_up_wide" if channels else "benchmark_start_up"
    print(f"saved to {save_record(name, figures, output_dir)}")
    return figures


if __name__ == "__main__":
    run_command(main)
