"""The paper's commonsense and arithmetic test sets, as LLM-Adapters (arXiv 2304.01933) distributes and scores them.

A set is a JSON list of {instruction, output, answer}. The prompt is `instruction`, in the same form as in training, and
the answer is found in the model's text by the rules of `nara_diffusion.dllm.evaluation.answers`:

    number   the last number, equal to the answer within 0.001           AddSub GSM8K MultiArith SingleEq SVAMP
    letter   the last of A … E that stands alone                         AQuA
    choice   the first of answer1 … answer5, ending1 …, option1 …,       ARC-c ARC-e OpenBookQA SIQA HellaSwag
             solution1 …, true, false: those of the set                  WinoGrande PIQA BoolQ

The source of the files, by --metadata:

    data_dir=DIR    DIR/AddSub/test.json and so on, as in the dataset/ folder of LLM-Adapters' repository
    (left out)      that repository; each file is downloaded once to the cache of Hugging Face's libraries
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from datasets import Dataset
from huggingface_hub.constants import HF_HOME

from nara_diffusion.dllm.evaluation.answers import by_choice, by_letter, by_number
from nara_diffusion.lm_eval.download import download

SOURCE = "https://raw.githubusercontent.com/AGI-Edgerunners/LLM-Adapters/main/dataset"
CACHE = Path(HF_HOME) / "nara_diffusion" / "llm_adapters"


def load(name: str, data_dir: str | None = None, **_: Any) -> dict[str, Dataset]:
    """The test split {"test": rows {question, answer}} of the set in the folder `name`.

    Args:
        data_dir: see the module's docstring. _: what else --metadata has, which is for other tasks.

    Raises:
        ValueError: there is no such file, it is no JSON list, or a record has no instruction or answer.
    """
    path = (CACHE if data_dir is None else Path(str(data_dir))) / name / "test.json"
    if data_dir is None and not path.is_file():
        download(f"{SOURCE}/{name}/test.json", path)
    if not path.is_file():
        raise ValueError(
            f"there is no file {path}: put {SOURCE}/{name}/test.json there, or leave data_dir out of --metadata to "
            "download it"
        )
    try:
        records = json.loads(path.read_text(encoding="utf-8-sig"))
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is no JSON: line {error.lineno}, column {error.colno}, {error.msg}") from None
    if not isinstance(records, list) or not records:
        raise ValueError(f'{path} holds no list of records: expected [{{"instruction": …, "answer": …}}, …]')
    rows = [_row(record, f"record {n} of {path}") for n, record in enumerate(records, 1)]
    return {"test": Dataset.from_list(rows)}


def _row(record: Any, where: str) -> dict[str, str]:
    if not isinstance(record, Mapping) or not record.get("instruction") or record.get("answer") in (None, "", []):
        raise ValueError(f"{where} lacks an instruction or an answer: both are needed")
    answer, input = record["answer"], str(record.get("input") or "")
    instruction = str(record["instruction"])
    return {
        "question": f"{instruction}\n\n{input}" if input else instruction,
        "answer": str(answer[-1] if isinstance(answer, list) else answer).strip(),
    }


def score_number(doc: Mapping[str, str], results: Sequence[str]) -> dict[str, float]:
    """{"acc": 1 or 0}: whether the last number of the text equals the answer's last one."""
    return {"acc": float(by_number(results[0], doc["answer"]).is_right)}


def score_letter(doc: Mapping[str, str], results: Sequence[str]) -> dict[str, float]:
    """{"acc": 1 or 0}: whether the last letter A … E of the text is the answer."""
    return {"acc": float(by_letter(results[0], doc["answer"]).is_right)}


def score_choice(doc: Mapping[str, str], results: Sequence[str]) -> dict[str, float]:
    """{"acc": 1 or 0}: whether the first choice of the answer's kind in the text is the answer."""
    return {"acc": float(by_choice(results[0], doc["answer"]).is_right)}
