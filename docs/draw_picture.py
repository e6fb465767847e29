"""Draws the README's picture from a finished run of train_scripts/dllm.py.

    python docs/draw_picture.py outputs/dllm-1

Left and middle: how the base model and the adapted one answer a held-out question, one row a step, from an answer
of masks (λ = 1) to a finished one. Right: the loss at each noise level, from the run's results.json.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch
import yaml
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from peft import PeftModel

from nara_diffusion.dllm import generate, load_backbone, prompt_text, read_records

Step = tuple[float, list[str]]  # λ, and the answer's tokens
MASK, END = "mask", "end"


def trace(model: PeftModel, tokenizer, question: str, gen_length: int) -> list[Step]:
    """What the model saw before each step of an answer to `question`, and the finished answer."""
    prompt = tokenizer(prompt_text(tokenizer, question), add_special_tokens=False, return_tensors="pt").input_ids
    seen: list[torch.Tensor] = []
    hook = model.register_forward_pre_hook(lambda module, args: seen.append(args[0][0, prompt.shape[1] :]))
    try:
        sequence = generate(model, prompt, gen_length=gen_length)
    finally:
        hook.remove()
    steps = []
    for answer in [*seen, sequence[0, prompt.shape[1] :]]:
        tokens = tokenizer.convert_ids_to_tokens(answer.tolist())
        shown = [MASK if t == tokenizer.mask_token else END if t.startswith("<|") else t for t in tokens]
        steps.append((shown.count(MASK) / len(shown), shown))
    return steps


def draw_trace(axis: Axes, steps: list[Step], title: str, right: bool) -> None:
    colour = "tab:green" if right else "tab:red"
    for row, (share, tokens) in enumerate(steps):
        axis.text(-0.9, row, f"{share:.2f}", ha="right", va="center", fontsize=9, color="tab:gray")
        for column, token in enumerate(tokens):
            if token == MASK:
                axis.add_patch(Rectangle((column - 0.42, row - 0.42), 0.84, 0.84, color="0.85"))
            else:
                text = "·" if token == END else token
                axis.text(column, row, text, ha="center", va="center", color=colour if token != END else "0.6")
    axis.text(-0.9, -1, "λ", ha="right", va="center", color="tab:gray")
    axis.set(xlim=(-2.2, len(steps[0][1])), ylim=(len(steps), -1.6), title=title)
    axis.axis("off")


def main(run: str | Path, output: str | Path = "docs/nara.png", question: int = 0) -> None:
    """Draw the `question`-th of the held-out questions that the adapter gets right and the base model wrong."""
    run = Path(run)
    results = json.loads((run / "results.json").read_text())
    settings = yaml.safe_load((run / "config.yaml").read_text())
    base, tokenizer = load_backbone(settings["pretrained_model_name_or_path"])
    model = PeftModel.from_pretrained(base, run)
    found = -1
    for record in read_records(settings["test_file"]):
        with model.disable_adapter():
            before = trace(model, tokenizer, record["instruction"], settings["gen_length"])
        after = trace(model, tokenizer, record["instruction"], settings["gen_length"])
        texts = ["".join(t for t in steps[-1][1] if t != END) for steps in (before, after)]
        found += texts[0] != record["answer"] == texts[1]
        if found == question:
            break
    else:
        raise ValueError(f"only {found + 1} questions are wrong before and right after: choose a smaller --question")

    figure = Figure(figsize=(13, 4.2), layout="constrained")
    left, middle, right = figure.subplots(1, 3, width_ratios=(1, 1, 1.1))
    shares = [f"{results[f'exact_match_{when}']:.0%} of {results['n']} right" for when in ("before", "after")]
    draw_trace(left, before, f"base model: {shares[0]}", right=False)
    draw_trace(middle, after, f"with NaRA: {shares[1]}", right=True)
    right.plot(results["noise_levels"], results["curve_before"], "o-", color="tab:gray", label="base model")
    right.plot(results["noise_levels"], results["curve_after"], "o-", color="tab:green", label="with NaRA")
    right.set(xlabel="noise level λ (1 = all masked)", ylabel="loss (nats per masked token)", yscale="log")
    right.set_title("loss on held-out questions")
    right.legend(loc="center right")
    figure.suptitle(f"“{record['instruction']}”  →  {record['answer']}")
    figure.savefig(output, dpi=110)
    print(f"drawn in {output}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Draw the README's picture from a run of train_scripts/dllm.py.")
    parser.add_argument("run", help="output folder of the run")
    parser.add_argument("--output", default="docs/nara.png", help="the picture")
    parser.add_argument("--question", type=int, default=0, help="which of the questions that got right (default: 0)")
    arguments = parser.parse_args()
    main(arguments.run, arguments.output, arguments.question)
