"""The paper's commonsense and arithmetic test sets, as LLM-Adapters (arXiv 2304.01933) distributes and scores them.

A set is a JSON list of {instruction, output, answer}. The prompt is `instruction`, in the same form as in training, and
the answer is found in the model's text by the rules of `nara_diffusion.dllm.evaluation.answers`:

    number   the last number, equal to the answer within 0.001           AddSub GSM8K MultiArith SingleEq SVAMP
    letter   the last of A … E that stands alone                         AQuA
    choice   the first of answer1 …, ending1 …, option1 …,               ARC-c ARC-e OpenBookQA SIQA HellaSwag
             solution1 …, true, false: those of the set                  WinoGrande PIQA BoolQ

The files are those of LLM-Adapters' repository, which `datasets` downloads once, or by --metadata data_dir=DIR those in
DIR/AddSub/test.json and so on, as in its dataset/ folder.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

from datasets import Dataset, load_dataset

from nara_diffusion.dllm.evaluation.answers import compare

SOURCE = "https://raw.githubusercontent.com/AGI-Edgerunners/LLM-Adapters/main/dataset"


def load(name: str, data_dir: str | None = None, **_: Any) -> dict[str, Dataset]:
    """The test split {"test": rows {question, answer}} of the set in the folder `name`.

    Args:
        data_dir: see the module's docstring. _: what else --metadata has, which is for other tasks.
    """
    records: Any = load_dataset("json", data_files=f"{data_dir or SOURCE}/{name}/test.json", split="train")
    return {"test": Dataset.from_list([_row(record) for record in records])}


def _row(record: Mapping[str, Any]) -> dict[str, str]:
    answer, input = record["answer"], record.get("input")
    return {
        "question": f"{record['instruction']}\n\n{input}" if input else record["instruction"],
        "answer": str(answer[-1] if isinstance(answer, list) else answer).strip(),
    }


def _score(rule: str, doc: Mapping[str, str], results: Sequence[str]) -> dict[str, float]:
    """{"acc": 1 or 0}: whether the text names the answer by the rule."""
    return {"acc": float(compare(rule, results[0], doc["answer"]).is_right)}


score_number, score_letter, score_choice = (partial(_score, rule) for rule in ("number", "letter", "choice"))
