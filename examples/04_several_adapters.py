"""Several adapters in one model: each with its own core, used in turn, together, and merged at one noise level.

    python examples/04_several_adapters.py

Two NaRA adapters learn different halves of the shipped task and are switched by name. A third is a plain LoRA,
`core_type="identity"`: a PEFT model holds adapters of one type, and so a LoRA joins. A NaRA update depends on
λ, so it can be merged into the weights for one λ only, and merging without one is refused. Takes less than a minute.
"""

from __future__ import annotations

import argparse

import torch
from peft import get_peft_model
from shipped_task import GEN_LENGTH, fine_tune, load_rows, load_shipped_model, make_collator

from nara_diffusion import NaraConfig, noise_level
from nara_diffusion.dllm import exact_match

CONFIGS = {
    "shift": NaraConfig(r=8, lora_alpha=8, target_modules="all-linear"),
    "upper": NaraConfig(r=4, lora_alpha=8, target_modules="all-linear", use_dora=True),
    "plain": NaraConfig(r=8, lora_alpha=8, target_modules="all-linear", core_type="identity"),
}
QUESTIONS = {"shift": "then shift", "upper": "then upper", "plain": "then upper"}


def main(steps: int = 60, n: int = 50) -> dict[str, dict[str, float]]:
    """Train the three for `steps` steps each; returns each one's share of right answers on each kind of question."""
    torch.manual_seed(0)
    base, tokenizer = load_shipped_model()
    collator = make_collator(tokenizer)
    model = get_peft_model(base, CONFIGS["shift"], adapter_name="shift")
    for name in ("upper", "plain"):
        model.add_adapter(name, CONFIGS[name])

    for name, words in QUESTIONS.items():
        model.set_adapter(name)  # active, and the only one that is trained
        fine_tune(model, load_rows(tokenizer, "train", only=words), collator, steps)

    tests = {words: load_rows(tokenizer, "test", only=words) for words in dict.fromkeys(QUESTIONS.values())}
    tests = {words: rows.select(range(min(n, len(rows)))) for words, rows in tests.items()}

    def right() -> dict[str, float]:
        return {
            words: exact_match(model, tokenizer, rows, gen_length=GEN_LENGTH, batch_size=n, progress=False).score
            for words, rows in tests.items()
        }

    table = {}
    for name in CONFIGS:
        model.set_adapter(name)
        table[name] = right()
    with model.disable_adapter():
        table["none"] = right()
    for name, scores in table.items():
        print(f"adapter {name:6s} " + ", ".join(f"{words}: {score:4.0%}" for words, score in scores.items()))

    merge_at_one_noise_level(model)
    return table


@torch.no_grad()
def merge_at_one_noise_level(model: torch.nn.Module) -> None:
    """Show that a merged adapter equals itself at that λ, and what is said without one."""
    model.set_adapter("shift")
    try:
        model.merge_adapter()
    except ValueError as error:
        print(f"merging without a noise level: {error}")
    input_ids = torch.arange(20)[None]  # (1, l)
    with noise_level(model, 0.5):
        apart = model(input_ids).logits
        model.merge_adapter()
        merged = model(input_ids).logits
    model.unmerge_adapter()
    print(f"merged at λ = 0.5, logits differ by {(apart - merged).abs().max():.1e} at most")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Train, switch and merge several adapters in one model.")
    parser.add_argument("--steps", type=int, default=60, help="train steps of each adapter (default: 60)")
    main(steps=parser.parse_args().steps)
