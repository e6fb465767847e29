"""NaRA as few kernels as LoRA, and no reads: kernels of a layer in bfloat16 under autocast, reads, and CPU time.

    python examples/benchmarks/measure_kernels.py [--rounds 0]

Kernels are counted beside the base's own. The counts don't depend on the machine; the two rows of times do, and are
left out with --rounds 0.
"""

from __future__ import annotations

import torch
from benchmark_record import one_thread, run_command
from benchmark_speed import ratios_of, times_of
from device_reads import reads_of_generation, reads_of_loss, reads_of_unet
from kernel_counts import METHODS, kernels_of_hypernetwork, kernels_of_layer

# 26 for NaRA-DoRA's inference: the parts of its norm that don't depend on λ aren't kept (layers/dora.py says why)
AIMS = {
    "NaRA": {"forward": 6, "backward": 12, "inference": 6},
    "NaRA-DoRA": {"forward": 22, "backward": 23, "inference": 26},
}
TIMES = {"NaRA / LoRA": {"train": 0.88, "inference": 0.88}, "NaRA-DoRA / DoRA": {"train": 0.70, "inference": 0.50}}


READS = {
    "a forward of SDXL's UNet": (reads_of_unet, 0),
    "masked_diffusion_loss": (reads_of_loss, 0),
    "a step of generate": (reads_of_generation, 1),
}


def main(rounds: int = 20, width: int = 1280) -> dict[str, dict[str, int]]:
    """Print the table, each figure beside its aim, and the operations behind each; return the counts."""
    counts: dict[str, dict[str, int]] = {}
    for method in METHODS:
        operations = kernels_of_layer(method)
        counts[method] = {kind: round(sum(of.values())) for kind, of in operations.items()}
        print(f"{method:10s} {_beside_aims(counts[method], AIMS.get(method, {}))}")
        for kind, of in operations.items():
            print(f"    {kind:10s} {', '.join(f'{name} {count:g}' for name, count in of.items())}")
    hypernetwork = kernels_of_hypernetwork()
    print(f"hypernetwork, once a forward: {hypernetwork.total()} (aim 12)")
    for name, (count, aim) in READS.items():
        print(f"reads of the device, {name}: NaRA {count('NaRA')} (aim {aim}), LoRA {count('LoRA')}")
    if rounds:
        with one_thread():
            times = times_of(torch.bfloat16, (4, 256, width), 16, rounds)
        for pair, ratio in ratios_of(times).items():
            print(f"CPU time, {pair}: {_beside_aims(ratio, TIMES[pair])}")
    return {**counts, "hypernetwork": {"forward": hypernetwork.total()}}


def _beside_aims(figures: dict[str, int] | dict[str, float], aims: dict[str, int] | dict[str, float]) -> str:
    parts = []
    for name, figure in figures.items():
        text = f"{name} {figure:.2f}" if isinstance(figure, float) else f"{name} {figure}"
        parts.append(f"{text} (aim {aims[name]})" if name in aims else text)
    return ", ".join(parts)


if __name__ == "__main__":
    run_command(main)
