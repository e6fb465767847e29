"""One record of an accelerator: which tests passed there, speed and kernels beside LoRA, memory beside --plan.

    bash examples/benchmarks/on_gpu.sh [--device cpu]

on_gpu.sh runs the tests first, and names their JUnit file here. Its figures go to OUTPUT_DIR/on_device.json.
"""

from __future__ import annotations

import platform
from typing import Any
from xml.etree import ElementTree

import benchmark_speed
import measure_kernels
import measure_memory
import torch
from benchmark_record import run_command, save_record

SPEED: dict[str, dict[str, Any]] = {
    "cpu": {"rounds": 2, "shape": (2, 16, 64), "rank": 4},
    "cuda": {"rounds": 30, "shape": (4, 4096, 1280)},
}
MEMORY = {"cpu": "tiny", "cuda": "1b"}


def outcomes(file: str) -> dict[str, str]:
    """Return {test: "passed", "failed" or "skipped"} of a JUnit file."""
    by_test = {}
    for case in ElementTree.parse(file).iter("testcase"):
        states = {child.tag for child in case}
        is_bad = states & {"failure", "error"}
        by_test[case.attrib["name"]] = "failed" if is_bad else "skipped" if "skipped" in states else "passed"
    return by_test


def main(device: str = "cuda", tests: str = "", output_dir: str = "outputs/on_gpu") -> dict[str, Any]:
    """Measure on `device`, write the record, and return it."""
    if device != "cpu" and not torch.cuda.is_available():
        raise SystemExit("error: torch finds no CUDA device; --device cpu tries everything at a small size")
    name = platform.processor() if device == "cpu" else torch.cuda.get_device_name()
    figures: dict[str, Any] = {
        "device": f"{device}: {name}",
        "tests": outcomes(tests) if tests else {},
        "speed": benchmark_speed.main(device=device, output_dir=output_dir, **SPEED[device]),
        "kernels": measure_kernels.main(rounds=0),
        "memory": measure_memory.main(size=MEMORY[device], device=device),
    }
    print(f"saved to {save_record('on_device', figures, output_dir)}")
    return figures


if __name__ == "__main__":
    run_command(main)
