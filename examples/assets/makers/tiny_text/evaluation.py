"""How good llada-tiny is: exact match by generation."""

from __future__ import annotations

from tqdm import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from nara_diffusion.dllm.data.encoding import encode_records
from nara_diffusion.dllm.data.records import normalized
from nara_diffusion.dllm.evaluation.exact_match import exact_match

from .data import MAX_TOKENS
from .tasks import Question

GEN_LENGTH = 12  # tokens; the longest answer has 9 and its <|eot_id|>
BATCH = 256  # questions


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
