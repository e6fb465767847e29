"""Questions and answers as token ids: LLaDA's chat form, padded with EOS that is trained on.

A row is  prompt (chat template) · answer · <|eot_id|> · EOS EOS …  so the model also learns where an answer ends.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from tqdm import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from nara_diffusion.dllm.encoding import encode_records
from nara_diffusion.dllm.exact_match import exact_match
from nara_diffusion.dllm.records import normalized
from nara_diffusion.dllm.tokenizer import prompt_text

from .tasks import FAMILIES, Question, questions
from .tokenizer import EOT

MAX_TOKENS = 36
GEN_LENGTH = 12  # tokens; the longest answer has 9 and its <|eot_id|>
BATCH = 256  # questions of one generation
LONGEST_TAIL = 3  # EOS tokens after the longest answer of a batch, at most


@dataclass(frozen=True)
class Rows:
    """Encoded questions.

    Attributes:
        input_ids: (n, MAX_TOKENS) int16, padded with EOS.
        prompt_lengths: (n,) tokens before the answer.
        ends: (n,) the position after the answer's <|eot_id|>.
    """

    input_ids: torch.Tensor
    prompt_lengths: torch.Tensor
    ends: torch.Tensor

    def batch(self, indices: torch.Tensor, tail: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Rows as (input_ids (b, l), prompt_lengths (b,)); l is ``tail`` more than the longest needs."""
        width = min(int(self.ends[indices].max()) + tail, MAX_TOKENS)
        return self.input_ids[indices, :width].long(), self.prompt_lengths[indices]


def encode(items: list[Question], tokenizer: PreTrainedTokenizerFast) -> Rows:
    """Raises ValueError if a question and its answer don't fit into MAX_TOKENS."""
    prompts = [prompt_text(tokenizer, question) for question, _ in items]
    prompt_ids = tokenizer(prompts, add_special_tokens=False)["input_ids"]
    answer_ids = tokenizer([answer + EOT for _, answer in items], add_special_tokens=False)["input_ids"]
    rows = [prompt + answer for prompt, answer in zip(prompt_ids, answer_ids, strict=True)]
    longest = max(rows, key=len)
    if len(longest) > MAX_TOKENS:
        raise ValueError(
            f"{tokenizer.decode(longest)!r} has {len(longest)} tokens, a row holds {MAX_TOKENS}: shorten it"
        )
    padded = [row + [tokenizer.eos_token_id] * (MAX_TOKENS - len(row)) for row in rows]
    return Rows(
        input_ids=torch.tensor(padded, dtype=torch.int16),
        prompt_lengths=torch.tensor([len(prompt) for prompt in prompt_ids]),
        ends=torch.tensor([len(row) for row in rows]),
    )


def training_and_validation(
    train_size: int, validation_size: int, seed: int
) -> tuple[list[Question], dict[str, list[Question]]]:
    """Questions of every family: ``train_size`` each to learn from, ``validation_size`` each by family.

    A validation question never occurs in training, except in families that are too small for that: there are only so
    many sums and products of two digits.
    """
    train: list[Question] = []
    validation: dict[str, list[Question]] = {}
    for name in tqdm(FAMILIES, desc="questions"):
        learned = questions(name, train_size, seed)
        fresh = sorted(set(questions(name, 20 * validation_size, seed + 1)) - set(learned)) or sorted(set(learned))
        generator = torch.Generator().manual_seed(seed)
        chosen = torch.randperm(len(fresh), generator=generator)[:validation_size].tolist()
        validation[name] = [fresh[i] for i in chosen]
        train += learned
    return train, validation


def exact_match_by_family(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    held_out: dict[str, list[Question]],
    gen_length: int = GEN_LENGTH,
) -> dict[str, float]:
    """The share of each family's questions that greedy generation, one token a step, answers to the letter."""
    scores = {}
    for name, items in tqdm(held_out.items(), desc="exact match", unit="family"):
        records = [{"instruction": question, "output": answer} for question, answer in items]
        rows = encode_records(normalized(records, source=name), tokenizer, max_length=MAX_TOKENS).rows
        scores[name] = exact_match(
            model, tokenizer, rows, gen_length=gen_length, batch_size=BATCH, progress=False
        ).score
    return scores
