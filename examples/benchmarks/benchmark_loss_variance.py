"""How much noisier a training step is without stratified noise levels and complementary masks.

    python examples/benchmarks/benchmark_loss_variance.py

The same questions are masked anew many times, and each time loss and gradient of one step are computed; all that varies
is the draw. Every way runs the model on the same number of sequences: with complementary masks half as many questions
appear twice, the other ways repeat each question with independent masks. Printed is the variance of the loss, and of
the gradient (summed over the adapter's parameters), each relative to independent noise levels and masks. The model is
the shipped one with an adapter after a few steps of training, so that the gradient is not that of a zero B.
"""

from __future__ import annotations

import statistics
import sys
from pathlib import Path
from typing import Any

import torch
from benchmark_record import run_command, save_record
from peft import PeftModel, get_peft_model
from tqdm.auto import tqdm

from nara_diffusion import NaraConfig
from nara_diffusion.dllm import masked_diffusion_loss

sys.path.append(str(Path(__file__).parents[1]))

from shipped_task import fine_tune, load_rows, load_shipped_model, make_collator

INDEPENDENT = "independent"
WAYS = {
    INDEPENDENT: {"group_size": 1, "complementary": False},
    "stratified": {"group_size": None, "complementary": False},
    "complementary": {"group_size": 1, "complementary": True},
    "stratified and complementary": {"group_size": None, "complementary": True},
}


def draw(
    model: PeftModel, batch: dict[str, torch.Tensor], way: dict[str, Any], seed: int
) -> tuple[float, torch.Tensor]:
    """Loss, and gradient (p,) of all trainable parameters, for one draw of noise levels and masks."""
    if not way["complementary"]:
        batch = {key: value.repeat_interleave(2, dim=0) for key, value in batch.items()}
    loss = masked_diffusion_loss(model, **batch, **way, seed=seed).loss
    parameters = [p for p in model.parameters() if p.requires_grad]
    gradients = torch.autograd.grad(loss, parameters)
    return loss.item(), torch.cat([gradient.flatten() for gradient in gradients])


def measure(model: PeftModel, batch: dict[str, torch.Tensor], way: dict[str, Any], draws: int) -> dict[str, float]:
    """Variance of loss and gradient over the draws, which have seeds 0, 1, …"""
    losses, total, squares = [], torch.zeros(()), 0.0
    for seed in tqdm(range(draws), leave=False):
        loss, gradient = draw(model, batch, way, seed)
        losses.append(loss)
        total = total + gradient
        squares += gradient.square().sum().item()
    gradient_variance = (squares - total.square().sum().item() / draws) / (draws - 1)  # Σ over parameters
    return {"mean": statistics.fmean(losses), "loss": statistics.variance(losses), "gradient": gradient_variance}


def main(
    questions: int = 16, draws: int = 200, steps: int = 50, output_dir: str = "outputs/benchmarks"
) -> dict[str, Any]:
    """Measure the four ways on a batch of `questions`; print them, save them as JSON, return the figures."""
    torch.manual_seed(0)
    base, tokenizer = load_shipped_model()
    model = get_peft_model(base, NaraConfig(r=8, lora_alpha=8, target_modules="all-linear"))
    rows, collator = load_rows(tokenizer, "train"), make_collator(tokenizer)
    fine_tune(model, rows, collator, steps)
    batch = collator([rows[i] for i in range(questions)])
    variances = {name: measure(model, batch, way, draws) for name, way in WAYS.items()}
    for name, found in variances.items():
        relative = {key: found[key] / variances[INDEPENDENT][key] for key in ("loss", "gradient")}
        found.update({f"{key}_relative": value for key, value in relative.items()})
        print(
            f"{name:30s} mean loss {found['mean']:.4f}   variance of the loss × {relative['loss']:.2f}, "
            f"of the gradient × {relative['gradient']:.2f}"
        )
    figures = {"questions": questions, "draws": draws, "steps": steps, "variances": variances}
    print(f"saved to {save_record('benchmark_loss_variance', figures, output_dir)}")
    return figures


if __name__ == "__main__":
    run_command(main)
