"""Train on preference pairs {prompt, chosen, rejected}, by DPO on the likelihood bound of a masked language model.

    python examples/07_preferences.py

This is the loss of `train_scripts/dllm.py --objective dpo --train_file pairs.jsonl`, in a plain PyTorch loop:

    loss = − log σ( β [ (log p(chosen) − log p(rejected))  −  the same of the base ] )

The pairs are copies of words in which some letters are capitals: on average 35 % in the chosen copy, 10 % in the
rejected one. Nobody wrote one in capitals alone. Fine-tuning on the chosen copies imitates them, so that most letters
stay small; preferences say which way is better, and lead beyond the best that the data hold.
"""

from __future__ import annotations

import argparse
import random

import torch
from peft import get_peft_model
from shipped_task import load_shipped_model

from nara_diffusion import NaraConfig
from nara_diffusion.dllm import (
    AnswerCollator,
    encode_prompts,
    generate,
    log_likelihood,
    masked_diffusion_loss,
    preference_loss,
    prompt_text,
)

LETTERS = 6


def make_pairs(n: int, seed: int) -> list[dict[str, str]]:
    draw = random.Random(seed)
    words = ["".join(draw.choices("abcdefghijklmnopqrstuvwxyz", k=LETTERS)) for _ in range(n)]
    copied = lambda word, share: "".join(c.upper() if draw.random() < share else c for c in word)  # noqa: E731
    return [{"prompt": f"copy: {w}", "chosen": copied(w, 0.35), "rejected": copied(w, 0.1)} for w in words]


def encode(tokenizer, pairs) -> list[dict]:
    """Rows for `AnswerCollator`, as `encode_records` makes them of a file."""
    prompts = encode_prompts(tokenizer, [prompt_text(tokenizer, pair["prompt"]) for pair in pairs])
    rows = []
    for number, (prompt, pair) in enumerate(zip(prompts, pairs, strict=True)):
        chosen, rejected = (
            [*prompt, *tokenizer(pair[name]).input_ids, tokenizer.eos_token_id] for name in ("chosen", "rejected")
        )
        rows.append({"input_ids": chosen, "rejected": rejected, "prompt_length": len(prompt), "position": number})
    return rows


def main(steps: int = 80, n: int = 200, batch_size: int = 16) -> dict[str, tuple[float, float]]:
    """Returns {method: (share of n held-out pairs whose chosen copy it prefers, share of capitals that it writes)}."""
    train, held_out, results = make_pairs(4000, seed=0), make_pairs(n, seed=1), {}
    for method in ("base", "fine-tuned on the chosen", "preferences"):
        torch.manual_seed(0)
        model, tokenizer = load_shipped_model()
        model = get_peft_model(model, NaraConfig(r=8, lora_alpha=8, target_modules="all-linear"))
        collate = AnswerCollator(tokenizer.eos_token_id)
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=5e-3)
        for step in range(0 if method == "base" else steps):
            rows = encode(tokenizer, random.Random(step).sample(train, batch_size))
            if method == "preferences":  # chosen rows and rejected ones, with the same masks, also for the base
                loss = preference_loss(model, **collate(rows), seed=step, beta=0.05, draws=4).loss
            else:
                chosen = [{name: row[name] for name in ("input_ids", "prompt_length")} for row in rows]
                loss = masked_diffusion_loss(model, **collate(chosen), seed=step).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        batch = collate(encode(tokenizer, held_out))
        chosen, rejected = log_likelihood(model, **batch, samples=16, batch_size=64).chunk(2)
        answers = generate(model, batch["input_ids"][:n, : -LETTERS - 1], gen_length=LETTERS + 1)
        written = "".join(tokenizer.batch_decode(answers[:, -LETTERS - 1 :], skip_special_tokens=True))
        results[method] = (chosen > rejected).double().mean().item(), sum(map(str.isupper, written)) / len(written)
        preferred, capitals = results[method]
        print(f"{method}: prefers the chosen copy in {preferred:.0%} of the pairs, writes {capitals:.0%} capitals")
    return results


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Train the shipped model on preference pairs.")
    parser.add_argument("--steps", type=int, default=80, help="train steps (default: 80)")
    main(parser.parse_args().steps)
