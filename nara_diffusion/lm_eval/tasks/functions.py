"""What the task files call: questions, and the score of a generated text.

The paper's commonsense and arithmetic sets are as LLM-Adapters (arXiv 2304.01933) distributes and
scores them: a JSON list of {instruction, output, answer}. The prompt is `instruction`, in the same
form as in training. The rules of `nara_diffusion.dllm.exact_match` find the answer in the model's
text: number (AddSub, GSM8K, MultiArith, SingleEq, SVAMP), letter (AQuA), choice (ARC-c, ARC-e,
OpenBookQA, SIQA, HellaSwag, WinoGrande, PIQA, BoolQ). `datasets` downloads the files once from
LLM-Adapters' repository; --metadata data_dir=DIR reads DIR/AddSub/test.json and so on, as in its
dataset/ folder.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

from datasets import Dataset, load_dataset

from nara_diffusion.dllm.exact_match import compare

SOURCE = "https://raw.githubusercontent.com/AGI-Edgerunners/LLM-Adapters/main/dataset"


def load(name: str, data_dir: str | None = None, **_: object) -> dict[str, Dataset]:
    """Return the test split, {"test": rows {question, answer}}, of the set in the folder `name`.

    Args:
        data_dir: see the module's docstring.
        _: other entries of --metadata, for other tasks.
    """
    records: Any = load_dataset(
        "json", data_files=f"{data_dir or SOURCE}/{name}/test.json", split="train"
    )
    return {"test": Dataset.from_list([_row(record) for record in records])}


def _row(record: Mapping[str, Any]) -> dict[str, str]:
    question, answer = record["instruction"], record["answer"]
    if record.get("input"):
        question = f"{question}\n\n{record['input']}"
    if isinstance(answer, list):
        answer = answer[-1]
    return {"question": question, "answer": str(answer).strip()}


def _score(rule: str, doc: Mapping[str, str], results: Sequence[str]) -> dict[str, float]:
    """Return {"acc": 1 if the rule finds the right answer in the text, else 0}."""
    _, is_right = compare(rule, results[0], doc["answer"])
    return {"acc": float(is_right)}


score_number = partial(_score, "number")
score_letter = partial(_score, "letter")
score_choice = partial(_score, "choice")
