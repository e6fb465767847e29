"""λ as a token of the prompt: where it stands, what it says, that it isn't learnt, and when nara-check can try it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import nara_check
import torch
from check.level_token import with_level_token
from check.trials import CHEAP, CheckTask, restart

from nara_diffusion.dllm.masking import mask_answers

LLADA = Path(__file__).parents[2] / "examples" / "assets" / "llada-tiny"
DIGITS = list(range(15, 25))  # of llada-tiny
PROMPT = 20  # tokens of a question in `questions`


def test_with_level_token_appends_each_rows_digit():
    rows, prompts = [[5, 9, 11, 4, 6, 20, 8], [7, 21, 8, 21], [12, 4, 9, 25, 16]], [3, 0, 4]
    ids = torch.tensor([row + [1] * (7 - len(row)) for row in rows])
    lengths = [len(row) - prompt for row, prompt in zip(rows, prompts, strict=True)]
    options: dict[str, Any] = {"answer_lengths": lengths, "noise_level": torch.tensor([0.04, 0.57, 1.0])}
    batch = mask_answers(ids, prompts, mask_token_id=29, seed=3, **options)
    marked = with_level_token(batch, DIGITS)
    for row, (place, digit) in enumerate(zip(prompts, (15, 20, 24), strict=True)):
        for name, new in {"input_ids": digit, "targets": digit, "masked": 0, "answer": 0, "attention_mask": 1}.items():
            expected = getattr(batch, name)[row].tolist()  # type: ignore[union-attr]
            expected.insert(place, new)
            assert getattr(marked, name)[row].tolist() == expected, (name, row)
    assert torch.equal(marked.noise_level, batch.noise_level)
    masked = mask_answers(ids[:1], [3], mask_token_id=29, noise_level=0.22, seed=3, complementary=True)
    marked = with_level_token(masked, DIGITS)  # of complementary masks the level of each
    assert marked.input_ids[:, 3].tolist() == [DIGITS[2], DIGITS[7]]
    assert marked.attention_mask is None


def questions(folder: Path, monkeypatch: Any, *flags: str) -> CheckTask:
    """What nara-check would try on 24 questions."""
    monkeypatch.setattr(nara_check, "check_training", lambda task, run: task)
    rows = [{"instruction": f"code {10000 + 7 * n}", "output": "k7rqx0d3"} for n in range(24)]
    (folder / "train.jsonl").write_text("\n".join(map(json.dumps, rows)))
    flags = ("--rank", "2", "--output_dir", str(folder / "out"), "--trained_padding", "gen_length", *flags)
    return nara_check.check(str(LLADA), str(folder / "train.jsonl"), flags)  # type: ignore[return-value]


def test_text_check_gives_each_sample_its_level(tmp_path, monkeypatch):
    task = questions(tmp_path, monkeypatch, "--gen_length", "12")
    assert task.arms == ["base", "lora", "untold", "token", "nara"]
    assert task.with_token is not None
    restart(task, 0, CHEAP)
    names = {name for name, parameter in task.model.named_parameters() if parameter.requires_grad}
    assert names
    assert all(CHEAP in name for name in names)
    nara_size = sum(parameter.numel() for name, parameter in task.model.named_parameters() if "default" in name)
    size = sum(parameter.numel() for parameter in task.model.parameters() if parameter.requires_grad)
    assert abs(size / nara_size - 1) < 0.1
    for loss, marked_loss in zip((task.loss, task.held_out), task.with_token, strict=True):
        plain, changed = loss(range(5)), marked_loss(range(5))
        digits = torch.tensor([DIGITS[int(10 * level)] for level in changed.noise_level])
        assert torch.equal(changed.input_ids[:, PROMPT], digits)
        assert len(set(digits.tolist())) > 1
        other_tokens = torch.cat([changed.input_ids[:, :PROMPT], changed.input_ids[:, PROMPT + 1 :]], 1)
        assert torch.equal(other_tokens, plain.input_ids)
        assert torch.equal(changed.noise_level, plain.noise_level)
        assert changed.token_loss[:, PROMPT].eq(0).all()


def test_text_check_without_place_or_digits_omits_token(tmp_path, monkeypatch):
    full = questions(tmp_path, monkeypatch, "--gen_length", str(64 - PROMPT))
    assert "token" not in full.arms
    monkeypatch.setattr(nara_check, "digit_tokens", lambda tokenizer: [3] * 10)
    assert "token" not in questions(tmp_path, monkeypatch, "--gen_length", "12").arms
