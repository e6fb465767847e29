"""What stands in the place of TRL and dllm where these aren't installed: trainers with their arguments and batches.

Both give `compute_loss` the batches of their originals: input_ids, attention_mask, and labels that are −100 in the
prompt. `SFTTrainer` tokenizes pairs of prompt and completion; `MDLMTrainer` draws λ and masks the answer itself.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from importlib.util import find_spec
from types import ModuleType
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from datasets import Dataset
from peft import PeftConfig, get_peft_model
from torch import Tensor
from transformers import DataCollatorForSeq2Seq, Trainer, TrainingArguments


@dataclass
class SFTConfig(TrainingArguments):
    max_length: int = 64


class SFTTrainer(Trainer):
    def __init__(
        self, model: Any, args: SFTConfig, train_dataset: Dataset, processing_class: Any, peft_config: PeftConfig
    ) -> None:
        def tokenized(pair: dict[str, str]) -> dict[str, Any]:
            prompt = processing_class(pair["prompt"], add_special_tokens=False).input_ids
            answer = processing_class(pair["completion"], add_special_tokens=False).input_ids
            answer = [*answer, processing_class.eos_token_id]
            return {"input_ids": prompt + answer, "labels": [-100] * len(prompt) + answer}

        rows = train_dataset.map(tokenized, remove_columns=train_dataset.column_names)
        collator = DataCollatorForSeq2Seq(processing_class)
        super().__init__(get_peft_model(model, peft_config), args, collator, rows)


@dataclass
class MDLMConfig(TrainingArguments):
    time_epsilon: float = 1e-3


class MDLMTrainer(Trainer):
    def compute_loss(self, model: Any, inputs: dict[str, Tensor], return_outputs: bool = False, **_: Any) -> Any:
        clean, answer = inputs["input_ids"], inputs["labels"] != -100
        level = self.args.time_epsilon + (1 - self.args.time_epsilon) * torch.rand(len(clean), 1)
        masked = (torch.rand(clean.shape) < level) & answer
        noised = torch.where(masked, self.processing_class.mask_token_id, clean)
        outputs = model(input_ids=noised, attention_mask=inputs.get("attention_mask"))
        loss = F.cross_entropy(outputs.logits.transpose(1, 2), clean, reduction="none")
        loss = (loss * masked / level).sum() / answer.sum()
        return (loss, outputs) if return_outputs else loss


_PLACES = {"trl": (SFTConfig, SFTTrainer), "dllm.core.trainers": (MDLMConfig, MDLMTrainer)}


def provide_other_trainers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make `trl` and `dllm.core.trainers` importable until the test ends; the true ones where they are installed."""
    for place, classes in _PLACES.items():
        if find_spec(place.partition(".")[0]) is not None:
            continue
        module = ModuleType(place)
        vars(module).update({kind.__name__: kind for kind in classes})
        monkeypatch.setitem(sys.modules, place, module)
        while place := place.rpartition(".")[0]:
            monkeypatch.setitem(sys.modules, place, ModuleType(place))
