"""dllm.py's lengths: refused before a record is tokenised; blocks as in the model's own chat, in report and card."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from nara_diffusion.dllm import decoding, exact_match
from nara_diffusion.dllm.evaluation import before_after
from nara_diffusion.dllm.text_arguments import Arguments
from nara_diffusion.dllm.train import main

MODEL = str(Path(__file__).parents[2] / "examples" / "assets" / "llada-tiny")  # of 64 positions


def arguments(folder: Path, **changes: Any) -> Arguments:
    words = ["house", "planet", "tea", "zebra", "moon", "tree", "cup", "lamp"]
    (folder / "rows.jsonl").write_text(
        "".join(json.dumps({"instruction": f"reverse: {word}", "output": word[::-1]}) + "\n" for word in words)
    )
    data = {f"{part}_file": str(folder / "rows.jsonl") for part in ("train", "validation", "test")}
    small: dict[str, Any] = {"target_modules": ["q_proj"], "rank": 2, "adapter": "lora", "max_train_steps": 1}
    small |= {"train_batch_size": 2, "gradient_accumulation_steps": 1, "evaluation_options": {"curve_points": 1}}
    options = {"pretrained_model_name_or_path": MODEL, "output_dir": str(folder / "out"), "gen_length": 12}
    return Arguments(**{**data, **small, **options, **changes})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"gen_length": 64}, "gen_length is 64, and the model has 64 positions: lower it"),
        ({"max_length": 65}, "max_length is 65, and the model has 64 positions: lower it"),
        ({"gen_length": 12, "block_length": 5}, "block_length 5 doesn't divide gen_length 12"),
    ],
)
def test_lengths_are_refused_before_a_record_is_tokenised(
    changes: dict[str, Any], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("nara_diffusion.dllm.train.encode_records", lambda *_, **__: pytest.fail("tokenised"))
    with pytest.raises(ValueError, match=message):
        main(arguments(tmp_path, **changes))
    assert not (tmp_path / "out").exists()


def test_samples_beyond_the_positions_that_virtual_tokens_leave_are_refused(tmp_path: Path) -> None:
    changes = {"adapter": "prompt_tuning", "adapter_options": {"num_virtual_tokens": 30}}
    with pytest.raises(ValueError, match=r"together \d+, and the model has 34 positions"):
        main(arguments(tmp_path, gen_length=20, **changes))


@pytest.mark.parametrize(("given", "block"), [(None, 4), (6, 6)])
def test_report_and_card_have_the_block_length_of_the_models_own_chat(
    given: int | None, block: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(decoding.CHAT_BLOCK_LENGTHS, "llama", 4)
    asked = []
    monkeypatch.setattr(
        before_after, "exact_match", lambda *args, **how: asked.append(how["block_length"]) or exact_match(*args, **how)
    )
    main(arguments(tmp_path, block_length=given))
    assert asked == [block, block]
    card = (tmp_path / "out" / "README.md").read_text()
    assert f"generate(model, prompt, gen_length=12, block_length={block})" in card
    assert f"gen_length 12 in {12 // block} blocks" in card


def test_report_is_made_with_the_evaluation_options(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    monkeypatch.setattr(
        before_after, "exact_match", lambda *args, **how: asked.append(how) or exact_match(*args, **how)
    )
    given = {"remasking": "entropy", "entropy_bound": 0.1, "top_p": 0.9, "confidence_eos_eot_inf": True}
    main(arguments(tmp_path, evaluation_options={"curve_points": 1, **given}))
    assert [{name: how[name] for name in given} for how in asked] == [given, given]
    card = (tmp_path / "out" / "README.md").read_text()
    assert "top_p=0.9, remasking='entropy', entropy_bound=0.1, confidence_eos_eot_inf=True)" in card
