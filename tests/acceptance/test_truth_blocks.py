"""The Python of each page runs from top to bottom, in a clone of the repository."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model, get_peft_model_state_dict
from torch import Tensor
from transformers import DataCollatorForSeq2Seq, TrainingArguments

from nara_diffusion import NaraConfig
from nara_diffusion.dllm import load_backbone
from nara_diffusion.tuner.holder import holder_of
from tests.helpers.other_trainers import provide_other_trainers

ROOT = Path(__file__).parents[2]
LLADA = str(ROOT / "examples" / "assets" / "llada-tiny")


@pytest.fixture
def clone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder with the examples, whose outputs go to `tmp_path`."""
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def run_page(name: str) -> dict[str, Any]:
    """Run the blocks of a page of docs/ in order; what they define."""
    page = ROOT / "docs" / f"{name}.md"
    defined: dict[str, Any] = {"__name__": name}
    for block in re.findall(r"(?ms)^```python\n(.*?)^```", page.read_text(encoding="utf-8")):
        exec(compile(block, page, "exec"), defined)
    return defined


@pytest.mark.usefixtures("clone")
@pytest.mark.filterwarnings("ignore:Already found a `peft_config` attribute")
@pytest.mark.parametrize("page", ["noise", pytest.param("strength", marks=pytest.mark.slow)])
def test_blocks_of_a_page_run_in_order(page: str) -> None:
    assert run_page(page)


# ---------------------------------------------------------------------- docs/other_trainers.md


@pytest.fixture
def trainers(clone: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    provide_other_trainers(monkeypatch)
    return run_page("other_trainers")


def adapted() -> Any:
    config = NaraConfig(r=4, lora_alpha=4, target_modules=["q_proj", "v_proj"])
    return get_peft_model(load_backbone(LLADA)[0], config)


@pytest.mark.slow
def test_what_other_trainers_save_loads(trainers: dict[str, Any]) -> None:
    for folder, trained in (("sft/end", trainers["trainer"].model), ("own-loop", trainers["model"])):
        loaded = PeftModel.from_pretrained(load_backbone(LLADA)[0], f"outputs/{folder}")
        actual = get_peft_model_state_dict(loaded)
        for name, expected in get_peft_model_state_dict(trained).items():
            torch.testing.assert_close(actual[name], expected)


@pytest.mark.slow
def test_transformers_trainer_resumes_as_if_never_stopped(trainers: dict[str, Any]) -> None:
    options = {**trainers["options"], "max_steps": 4, "save_steps": 2, "learning_rate": 1e-2}
    weights = []
    for checkpoint in (None, "outputs/resumed/checkpoint-2"):
        arguments = TrainingArguments("outputs/resumed", **options)
        trainer = trainers["MaskedDiffusionTrainer"](
            adapted(), arguments, train_dataset=trainers["rows"], data_collator=trainers["collator"]
        )
        trainer.train(resume_from_checkpoint=checkpoint)
        weights.append({name: p for name, p in trainer.model.named_parameters() if p.requires_grad})
    for name, expected in weights[0].items():
        torch.testing.assert_close(weights[1][name], expected)


@pytest.mark.slow
def test_dllm_trainer_uses_its_drawn_masked_share(trainers: dict[str, Any]) -> None:
    from dllm.core.trainers import MDLMConfig  # type: ignore[import-not-found]

    def labelled(row: dict[str, Any]) -> dict[str, Any]:
        tokens, start = row["input_ids"], row["prompt_length"]
        return {"input_ids": tokens, "labels": [-100] * start + tokens[start:], "attention_mask": [1] * len(tokens)}

    model, tokenizer, rows = adapted(), trainers["tokenizer"], trainers["rows"].select(range(32))
    shares, levels = [], []

    def see_input(_: Any, __: Any, kwargs: dict[str, Tensor]) -> None:
        masked = (kwargs["input_ids"] == tokenizer.mask_token_id).sum(1)
        shares.append(masked / answers.pop(0))

    (core,) = holder_of(model.base_model.model).cores["default"].children()  # type: ignore[union-attr]
    core.register_forward_pre_hook(lambda _, given: levels.append(given[0].detach().clone()))
    model.base_model.model.register_forward_pre_hook(see_input, with_kwargs=True)
    answers: list[Tensor] = []

    def collate(batch: list[dict[str, Any]]) -> Any:
        collated = DataCollatorForSeq2Seq(tokenizer)(batch)
        answers.append((collated["labels"] != -100).sum(1))
        return collated

    arguments = MDLMConfig("outputs/mdlm", max_steps=3, eval_strategy="no", report_to="none", use_cpu=True)
    trainers["NoiseAwareMDLMTrainer"](
        model=model,
        args=arguments,
        train_dataset=rows.map(labelled, remove_columns=rows.column_names),
        data_collator=collate,
        processing_class=tokenizer,
    ).train()
    assert len(levels) == 3
    torch.testing.assert_close(torch.stack(levels), torch.stack(shares))
