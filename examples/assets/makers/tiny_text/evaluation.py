"""How good llada-tiny is: the loss on held-out questions, and exact match by generation."""

from __future__ import annotations

import torch
from tqdm import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from nara_diffusion.dllm import masked_diffusion_loss
from nara_diffusion.dllm.data.encoding import encode_records
from nara_diffusion.dllm.data.records import normalized
from nara_diffusion.dllm.evaluation.exact_match import exact_match

from .data import MAX_TOKENS, Rows
from .tasks import Question

GEN_LENGTH = 12  # tokens; the longest answer has 9 and its <|eot_id|>
BATCH = 256  # questions


@torch.no_grad()
def validation_loss(model: PreTrainedModel, rows: Rows, *, seed: int) -> float:
    """LLaDA's loss over all ``rows``, at stratified noise levels and masks that are the same at every call."""
    total, width = 0.0, int(rows.ends.max())
    for indices in torch.arange(len(rows.ends)).split(BATCH):
        input_ids, prompt_lengths = rows.input_ids[indices, :width].long(), rows.prompt_lengths[indices]
        loss = masked_diffusion_loss(
            model,
            input_ids.to(model.device),
            prompt_lengths.to(model.device),
            seed=seed + 1,
            sample_indices=indices,
            logits="all",
        )
        total += loss.per_sample.sum().item()
    return total / len(rows.ends)


def exact_match_by_family(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, questions: dict[str, list[Question]]
) -> dict[str, float]:
    """The share of each family's ``questions`` that greedy generation, one token a step, answers to the letter."""
    scores = {}
    for name, items in tqdm(questions.items(), desc="exact match", unit="family"):
        records = [{"instruction": question, "output": answer} for question, answer in items]
        rows = encode_records(normalized(records, source=name), tokenizer, max_length=MAX_TOKENS, progress=False).rows
        scores[name] = exact_match(
            model, tokenizer, rows, gen_length=GEN_LENGTH, batch_size=BATCH, progress=False
        ).score
    return scores
