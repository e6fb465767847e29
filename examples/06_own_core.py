"""A core of your own: a table over the noise level, registered in one line, then used like those of the package.

    python examples/06_own_core.py

NaRA's core is a small network, C(λ) = I + η F(e(λ)). Here C(λ) is read off a table instead: one learnable r × r matrix
at each of K noise levels, and a straight line between neighbours, so that C is smooth by construction. After
`register_core` every part of the package serves it: PEFT, the loss and the sampler, saving and loading, the Diffusers
loaders. Takes less than a minute and draws outputs/examples/06_own_core.png.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from matplotlib.figure import Figure
from peft import PeftModel, get_peft_model
from shipped_task import GEN_LENGTH, fine_tune, load_rows, load_shipped_model, make_collator, trainable_parameters
from torch import nn

from nara_diffusion import NaraConfig, core_matrix, noise_level, register_core
from nara_diffusion.dllm import exact_match

KNOTS = 5


class TableCore(nn.Module):
    """C(λ) = I + Σ_k w_k(λ) D_k, with w the hat functions of KNOTS evenly spaced levels: λ (b,) -> (b, r, r)."""

    def __init__(self, config: NaraConfig, rank: int) -> None:
        super().__init__()
        self.deviation = nn.Parameter(torch.zeros(KNOTS, rank, rank))  # D: zero, so that training starts as a LoRA

    def forward(self, noise_level: torch.Tensor) -> torch.Tensor:
        knots = torch.arange(KNOTS, device=noise_level.device)
        weights = (1 - (noise_level[:, None] * (KNOTS - 1) - knots).abs()).clamp(min=0)  # (b, K), each row sums to 1
        identity = torch.eye(self.deviation.shape[-1], device=noise_level.device)
        return identity + torch.einsum("bk,kij->bij", weights, self.deviation)


register_core("table", TableCore)  # before an adapter that has it is made or loaded


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


def main(steps: int = 250, n: int = 100, output_dir: str | Path = "outputs/examples") -> dict[str, float]:
    """Train, save, load, draw; returns the shares of right answers before, after, and loaded again."""
    torch.manual_seed(0)
    base, tokenizer = load_shipped_model()
    rows = load_rows(tokenizer, "test")
    rows = rows.select(range(min(n, len(rows))))

    def right(model: nn.Module) -> float:
        return exact_match(model, tokenizer, rows, gen_length=GEN_LENGTH, batch_size=n, progress=False).score

    model = get_peft_model(base, NaraConfig(core_type="table", r=8, lora_alpha=8, target_modules="all-linear"))
    print(trainable_parameters(model))
    results = {"before": right(model)}
    fine_tune(model, load_rows(tokenizer, "train"), make_collator(tokenizer), steps)
    results["after"] = right(model)

    folder = Path(output_dir) / "06_own_core"
    model.save_pretrained(folder)  # the name "table" and the tensors; the class stays in your program
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
    parser.add_argument("--steps", type=int, default=250, help="train steps (default: 250)")
    parser.add_argument("--output_dir", default="outputs/examples", help="where adapter and picture go")
    arguments = parser.parse_args()
    main(steps=arguments.steps, output_dir=arguments.output_dir)
