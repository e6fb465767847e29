"""Train on preference pairs {prompt, chosen, rejected}, by DPO on the likelihood bound of a masked language model.

    python examples/07_preferences.py

    loss = − log σ( β [ (log p(chosen) − log p(rejected))  −  the same of the base ] ),     log p by `log_likelihood`

The pairs are copies of words in which some letters are capitals: on average 35 % in the chosen copy, 10 % in the
rejected one. Nobody wrote one in capitals alone. Fine-tuning on the chosen copies imitates them, so that most letters
stay small; preferences say which way is better, and lead beyond the best that the data hold.
"""

from __future__ import annotations

import argparse
import random

import torch
import torch.nn.functional as F
from peft import get_peft_model
from shipped_task import load_shipped_model

from nara_diffusion import NaraConfig
from nara_diffusion.dllm import encode_prompts, generate, log_likelihood, masked_diffusion_loss, prompt_text

BETA, LETTERS = 0.05, 6
SAMPLES = {"samples": 4, "batch_size": 64}  # masks of an answer, their number of tokens stratified


def make_pairs(n: int, seed: int) -> list[dict[str, str]]:
    draw = random.Random(seed)
    words = ["".join(draw.choices("abcdefghijklmnopqrstuvwxyz", k=LETTERS)) for _ in range(n)]
    copied = lambda word, share: "".join(c.upper() if draw.random() < share else c for c in word)  # noqa: E731
    return [{"prompt": f"copy: {w}", "chosen": copied(w, 0.35), "rejected": copied(w, 0.1)} for w in words]


def encode(tokenizer, pairs, which: str) -> dict[str, torch.Tensor]:
    """A batch for `log_likelihood` and `masked_diffusion_loss`; here all rows have one length."""
    prompts = encode_prompts(tokenizer, [prompt_text(tokenizer, pair["prompt"]) for pair in pairs])
    answers = [[*tokenizer(pair[which]).input_ids, tokenizer.eos_token_id] for pair in pairs]
    rows = [prompt + answer for prompt, answer in zip(prompts, answers, strict=True)]
    return {"input_ids": torch.tensor(rows), "prompt_lengths": torch.tensor([len(prompt) for prompt in prompts])}


def preference_loss(model, chosen, rejected, seed: int) -> torch.Tensor:
    # the same masks for both and for the base, so that their differences vary less
    log_p = [log_likelihood(model, **batch, **SAMPLES, seed=seed, differentiable=True) for batch in (chosen, rejected)]
    with model.disable_adapter():
        base = [log_likelihood(model, **batch, **SAMPLES, seed=seed) for batch in (chosen, rejected)]
    return -F.logsigmoid(BETA * (log_p[0] - log_p[1] - base[0] + base[1])).mean()


def main(steps: int = 80, n: int = 200, batch_size: int = 16) -> dict[str, tuple[float, float]]:
    """Returns {method: (share of n held-out pairs whose chosen copy it prefers, share of capitals that it writes)}."""
    train, held_out, results = make_pairs(4000, seed=0), make_pairs(n, seed=1), {}
    for method in ("base", "fine-tuned on the chosen", "preferences"):
        torch.manual_seed(0)
        model, tokenizer = load_shipped_model()
        model = get_peft_model(model, NaraConfig(r=8, lora_alpha=8, target_modules="all-linear"))
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=5e-3)
        for step in range(0 if method == "base" else steps):
            pairs = random.Random(step).sample(train, batch_size)
            chosen, rejected = (encode(tokenizer, pairs, which) for which in ("chosen", "rejected"))
            imitation = lambda: masked_diffusion_loss(model, **chosen, seed=step).loss  # noqa: B023, E731
            (preference_loss(model, chosen, rejected, step) if method == "preferences" else imitation()).backward()
            optimizer.step()
            optimizer.zero_grad()
        batches = [encode(tokenizer, held_out, which) for which in ("chosen", "rejected")]
        scores = [log_likelihood(model, **batch, samples=16, batch_size=64) for batch in batches]
        answers = generate(model, batches[0]["input_ids"][:, : -LETTERS - 1], gen_length=LETTERS + 1)
        written = "".join(tokenizer.batch_decode(answers[:, -LETTERS - 1 :], skip_special_tokens=True))
        results[method] = (scores[0] > scores[1]).double().mean().item(), sum(map(str.isupper, written)) / len(written)
        preferred, capitals = results[method]
        print(f"{method}: prefers the chosen copy in {preferred:.0%} of the pairs, writes {capitals:.0%} capitals")
    return results


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Train the shipped model on preference pairs.")
    parser.add_argument("--steps", type=int, default=80, help="train steps (default: 80)")
    main(parser.parse_args().steps)
