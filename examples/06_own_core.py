"""A core of your own, registered in one line, then used like any other: a rotation, or NaRA's core of constant norm.

    python examples/06_own_core.py                         # a rotation whose angles grow with the noise
    python examples/06_own_core.py --core constant_norm    # NaRA's network, its C(λ) scaled to the norm of I

NaRA's core is a small network, C(λ) = I + η F(e(λ)). The rotation is C(λ) = exp(λ (P − Pᵀ)) with one learnable P: it
turns the r directions between A and B, the further the noisier, and never stretches them. The other core shows how to
change what becomes of NaRA's C(λ): it wraps the network. After `register_core` every part of the package serves such a
core: PEFT, the loss and the sampler, saving and loading, the Diffusers loaders. Takes less than a minute and draws
outputs/examples/06_own_core.png.
"""

from __future__ import annotations

import argparse
import math
from pathlib import Path

import torch
from matplotlib.figure import Figure
from peft import PeftModel, get_peft_model
from shipped_task import GEN_LENGTH, fine_tune, load_rows, load_shipped_model, make_collator, trainable_parameters
from torch import nn

from nara_diffusion import NaraConfig, core_matrix, noise_level, register_core
from nara_diffusion.cores.core import HypernetworkCore, NoiseEmbedding
from nara_diffusion.dllm import exact_match


class RotationCore(nn.Module):
    """C(λ) = exp(λ (P − Pᵀ)), orthogonal for every λ, and I without noise: λ (b,) -> (b, r, r)."""

    def __init__(self, config: NaraConfig, rank: int) -> None:
        super().__init__()
        self.P = nn.Parameter(torch.zeros(rank, rank))  # zero, so that training starts as a LoRA

    def forward(self, noise_level: torch.Tensor) -> torch.Tensor:
        return torch.linalg.matrix_exp(noise_level[:, None, None] * (self.P - self.P.T))


class ConstantNormCore(nn.Module):
    """C(λ) = √r N(λ) / ‖N(λ)‖, where N(λ) = I + η F(e(λ)) is NaRA's core: ‖C(λ)‖ = ‖I‖. λ (b,) -> (b, r, r)

    λ then mixes the r directions and doesn't scale the update as a whole.
    """

    def __init__(self, config: NaraConfig, rank: int) -> None:
        super().__init__()
        self.network = HypernetworkCore(
            rank,
            scale=config.core_scale,
            hidden_dims=config.core_hidden_dims,
            init=config.core_init,
            embedding=NoiseEmbedding(config.noise_embedding, config.noise_embedding_dim, config.fourier_scale),
        )

    def forward(self, noise_level: torch.Tensor) -> torch.Tensor:
        core = self.network(noise_level)
        return core * math.sqrt(core.shape[-1]) / core.norm(dim=(1, 2), keepdim=True)


CORES = {"rotation": RotationCore, "constant_norm": ConstantNormCore}
for name, core in CORES.items():
    register_core(name, core)  # before an adapter that has it is made or loaded


def draw(file: Path, model: PeftModel) -> None:
    """How far C(λ) is from I, and from its own mean over λ."""
    levels = torch.linspace(0, 1, 101)
    core = core_matrix(model, levels).detach()  # (101, r, r)
    figure = Figure(figsize=(6, 4), layout="constrained")
    axis = figure.subplots()
    for label, middle in (("‖C(λ) − I‖", torch.eye(core.shape[-1])), ("‖C(λ) − mean of C‖", core.mean(0))):
        axis.plot(levels, (core - middle).flatten(1).norm(dim=1), label=label)
    axis.set(xlabel="noise level λ", ylim=(0, None))
    axis.legend()
    figure.savefig(file, dpi=100)


def main(
    core: str = "rotation", steps: int = 250, n: int = 100, output_dir: str | Path = "outputs/examples"
) -> dict[str, float]:
    """Train, save, load, draw; returns the shares of right answers before, after, and loaded again."""
    torch.manual_seed(0)
    base, tokenizer = load_shipped_model()
    rows = load_rows(tokenizer, "test")
    rows = rows.select(range(min(n, len(rows))))

    def right(model: nn.Module) -> float:
        return exact_match(model, tokenizer, rows, gen_length=GEN_LENGTH, batch_size=n, progress=False).score

    model = get_peft_model(base, NaraConfig(core_type=core, r=8, lora_alpha=8, target_modules="all-linear"))
    print(trainable_parameters(model))
    results = {"before": right(model)}
    fine_tune(model, load_rows(tokenizer, "train"), make_collator(tokenizer), steps)
    results["after"] = right(model)

    folder = Path(output_dir) / "06_own_core"
    model.save_pretrained(folder)  # the name of the core and its tensors; the class stays in your program
    loaded = PeftModel.from_pretrained(load_shipped_model()[0], folder)
    results["loaded"] = right(loaded)
    with torch.no_grad(), noise_level(model, 0.5), noise_level(loaded, 0.5):
        input_ids = torch.arange(20)[None]  # (1, l)
        same = torch.equal(model(input_ids).logits, loaded(input_ids).logits)
    print("right answers: " + ", ".join(f"{score:.0%} {name}" for name, score in results.items()))
    print(f"saved and loaded, it gives the same logits: {same}")
    draw(folder.with_suffix(".png"), loaded)
    print(f"drawn in {folder.with_suffix('.png')}")
    return results


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Register a core of your own and fine-tune the shipped model with it.")
    parser.add_argument("--core", choices=CORES, default="rotation", help="which core (default: rotation)")
    parser.add_argument("--steps", type=int, default=250, help="train steps (default: 250)")
    parser.add_argument("--output_dir", default="outputs/examples", help="where adapter and picture go")
    arguments = parser.parse_args()
    main(arguments.core, steps=arguments.steps, output_dir=arguments.output_dir)
