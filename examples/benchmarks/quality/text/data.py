"""A domain as token ids: made once a backbone, used by all its runs.

A row is  prompt (chat template) · answer · end · padding.  The answer's region has one length in the whole domain, and
what follows the answer's end in it are end tokens that are masked and trained on, as LLaDA does. So a share λ of masked
tokens means the same in training, in validation, and in generation, which fills a region of that length.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from transformers import PreTrainedTokenizerBase

from nara_diffusion.dllm.tokenizer import encode_prompts, end_token_id, prompt_text
from quality.text.domains import PARTS, Domain, Question


@dataclass(frozen=True)
class Rows:
    """Attributes:
    questions: n of them.
    input_ids: (n, l), padded on the right.
    prompt_lengths: (n,) tokens before the answer.
    answer_length: tokens of every answer's region.
    """

    questions: list[Question]
    input_ids: torch.Tensor
    prompt_lengths: torch.Tensor
    answer_length: int

    def __len__(self) -> int:
        return len(self.questions)

    def batch(self, indices: torch.Tensor) -> dict[str, torch.Tensor]:
        """The rows `indices` (b,), no wider than they need, as `mask_answers` takes them."""
        prompt_lengths = self.prompt_lengths[indices]
        width = int(prompt_lengths.max()) + self.answer_length
        return {
            "input_ids": self.input_ids[indices, :width],
            "prompt_lengths": prompt_lengths,
            "answer_lengths": torch.full_like(prompt_lengths, self.answer_length),
        }


@dataclass(frozen=True)
class EncodedDomain:
    """The parts of a `Domain`."""

    train: Rows
    tuning: Rows
    validation: Rows
    test: Rows


def encode_domain(domain: Domain, tokenizer: PreTrainedTokenizerBase) -> EncodedDomain:
    """All questions of `domain` as token ids."""
    parts = {name: getattr(domain, name) for name in PARTS}
    answers = {name: _answer_ids(tokenizer, questions) for name, questions in parts.items()}
    length = max(len(answer) for part in answers.values() for answer in part)
    return EncodedDomain(
        **{name: _rows(tokenizer, questions, answers[name], length) for name, questions in parts.items()}
    )


def _answer_ids(tokenizer: PreTrainedTokenizerBase, questions: Sequence[Question]) -> list[list[int]]:
    """Each answer's tokens with the end token."""
    ids = tokenizer([question.answer for question in questions], add_special_tokens=False)["input_ids"]
    return [[*answer, _turn_end(tokenizer)] for answer in ids]


def _turn_end(tokenizer: PreTrainedTokenizerBase) -> int:
    """The token that ends the assistant's turn, or the text where the tokenizer knows no turns."""
    vocabulary = tokenizer.get_vocab()
    ends = [vocabulary[name] for name in ("<|eot_id|>", "<|im_end|>") if name in vocabulary]
    return ends[0] if ends else end_token_id(tokenizer)


def _rows(tokenizer: PreTrainedTokenizerBase, questions: list[Question], answers: list[list[int]], length: int) -> Rows:
    prompts = encode_prompts(tokenizer, [prompt_text(tokenizer, question.text) for question in questions])
    end = end_token_id(tokenizer)
    prompt_lengths = torch.tensor([len(prompt) for prompt in prompts])
    input_ids = torch.full((len(questions), int(prompt_lengths.max()) + length), end)
    for row, prompt, answer in zip(input_ids, prompts, answers, strict=True):
        row[: len(prompt) + len(answer)] = torch.tensor(prompt + answer)
    return Rows(questions, input_ids, prompt_lengths, length)
