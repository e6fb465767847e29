"""Text from noise: LLaDA's sampler on the shipped model, watched while it works.

    python examples/02_generate_with_llada.py

A masked-diffusion language model starts from an answer made of masks and fills it in, most confident tokens first. The
noise level λ is the share of the answer that is still masked: 1 at the start, 0 at the end. Fewer steps fill in more
tokens at once; with `confidence_threshold` the model itself says how many. Takes a few seconds.
"""

from __future__ import annotations

import random
import string
from typing import Any

import torch
from datasets import Dataset
from shipped_task import GEN_LENGTH, load_shipped_model
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from nara_diffusion.dllm import encode_records, exact_match, generate, prompt_text

WAYS: dict[str, dict[str, Any]] = {
    "one token a step": {"steps": GEN_LENGTH},
    "three tokens a step": {"steps": GEN_LENGTH // 3},
    "all at once": {"steps": 1},
    "every token above 0.9": {"confidence_threshold": 0.9},
}
QUESTIONS = ["reverse: planet", "upper: planet", "sort: planet", "shift: planet", "double: moon"]


def show_steps(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, question: str) -> str:
    """Generate an answer and print what the model sees before each step; returns the answer."""
    prompt = tokenizer(
        prompt_text(tokenizer, question), add_special_tokens=False, return_tensors="pt"
    ).input_ids  # (1, p)

    symbols = {token: "·" for token in tokenizer.get_vocab() if token.startswith("<|")}  # the end and its padding
    symbols[tokenizer.mask_token] = "▒"

    def show(module: nn.Module, args: tuple[torch.Tensor, ...]) -> None:
        answer = args[0][0, prompt.shape[1] :]  # (g,)
        share = (answer == model.config.mask_token_id).float().mean()
        tokens = tokenizer.convert_ids_to_tokens(answer.tolist())
        print(f"   λ = {share:.2f}   {' '.join(symbols.get(token, token) for token in tokens)}")

    print(question)
    hook = model.register_forward_pre_hook(show)
    try:
        sequence = generate(model, prompt, gen_length=GEN_LENGTH)
    finally:
        hook.remove()
    answer = tokenizer.decode(sequence[0, prompt.shape[1] :], skip_special_tokens=True)
    print(f"   answer     {answer}\n")
    return answer


def letters_to_sort(n: int) -> Dataset:
    """n questions of a kind that the model knows, though not perfectly: random letters to be sorted."""
    rng = random.Random(0)
    words = ["".join(rng.choices(string.ascii_lowercase, k=rng.randint(4, 7))) for _ in range(n)]
    pairs = [(f"sort: {word}", "".join(sorted(word))) for word in words]
    return Dataset.from_list(
        [{"instruction": question, "input": "", "output": answer, "answer": answer} for question, answer in pairs]
    )


def compare_ways(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, n: int) -> dict[str, tuple[float, int]]:
    """Share of right answers and forwards of the model for each way to place tokens, on n questions in one batch."""
    rows = encode_records(letters_to_sort(n), tokenizer, max_length=64).rows
    statistics = {}
    for name, sampling in WAYS.items():
        result = exact_match(
            model, tokenizer, rows, gen_length=GEN_LENGTH, batch_size=n, stop_at_eos=False, progress=False, **sampling
        )
        statistics[name] = (result.score, result.forwards)
        print(f"{name:24s} {result.score:7.1%} right, {result.forwards:2d} forwards")
    return statistics


def main(n: int = 200) -> dict[str, tuple[float, int]]:
    """Show a few answers step by step, then compare ways to place tokens on n questions; returns the comparison."""
    model, tokenizer = load_shipped_model()
    for question in QUESTIONS:
        show_steps(model, tokenizer, question)
    return compare_ways(model, tokenizer, n)


if __name__ == "__main__":
    main()
