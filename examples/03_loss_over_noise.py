"""Fine-tune the shipped model with NaRA in a plain PyTorch loop, and see at which noise levels that helped.

    python examples/03_loss_over_noise.py

The task asks for two steps in a row ("reverse then shift: planet"), the model was pre-trained on single ones. This is
what train_scripts/dllm.py does, without its flags, checkpoints and reports. Takes less than a minute and draws
outputs/examples/03_loss_over_noise.png: the validation loss over λ before and after, which is Figure 1 of the paper.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from matplotlib.figure import Figure
from peft import get_peft_model
from shipped_task import GEN_LENGTH, fine_tune, load_rows, load_shipped_model, make_collator, trainable_parameters

from nara_diffusion import NaraConfig
from nara_diffusion.dllm import exact_match, noise_level_curve

NOISE_LEVELS = [0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0]


def main(steps: int = 300, n: int = 100, output_dir: str | Path = "outputs/examples") -> dict[str, float]:
    """Train `steps` steps, evaluate on n questions before and after; returns the shares of right answers."""
    torch.manual_seed(0)
    model, tokenizer = load_shipped_model()
    train_rows, test_rows = load_rows(tokenizer, "train"), load_rows(tokenizer, "test")
    test_rows = test_rows.select(range(min(n, len(test_rows))))
    collator = make_collator(tokenizer)

    model = get_peft_model(model, NaraConfig(r=8, lora_alpha=8, target_modules="all-linear"))
    print(trainable_parameters(model))

    def evaluate() -> tuple[float, list[float]]:
        right = exact_match(model, tokenizer, test_rows, gen_length=GEN_LENGTH, batch_size=n)
        return right.score, noise_level_curve(model, test_rows, NOISE_LEVELS, collator=collator, batch_size=n)

    base_loss, base_curve = evaluate()  # a fresh adapter changes nothing: this is the base model
    fine_tune(model, train_rows, collator, steps)
    adapted_loss, adapted_curve = evaluate()

    print(f"right answers: {base_loss:.0%} before, {adapted_loss:.0%} after")
    picture = Path(output_dir) / "03_loss_over_noise.png"
    picture.parent.mkdir(parents=True, exist_ok=True)
    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.subplots()
    axes.plot(NOISE_LEVELS, base_curve, marker="o", label="base model")
    axes.plot(NOISE_LEVELS, adapted_curve, marker="o", label="with the adapter")
    axes.set(title="two-step questions, llada-tiny", xlabel="noise level λ (1 = pure noise)")
    axes.set_ylabel("loss (nats a token)")
    axes.legend()
    figure.savefig(picture)
    print(f"drawn in {picture}")
    return {"before": base_loss, "after": adapted_loss}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Fine-tune the shipped model and draw its loss over the noise level.")
    parser.add_argument("--steps", type=int, default=300, help="train steps (default: 300)")
    parser.add_argument("--output_dir", default="outputs/examples", help="where the picture goes")
    arguments = parser.parse_args()
    main(steps=arguments.steps, output_dir=arguments.output_dir)
