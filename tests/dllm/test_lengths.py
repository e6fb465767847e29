"""dllm.py's lengths: refused before a record is tokenised; blocks as in the model's own chat, in report and card."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from nara_diffusion.dllm import before_after, decoding, exact_match
from nara_diffusion.dllm.train import main
from tests.acceptance._commands import fresh_accelerate
from tests.acceptance._runs import text_arguments  # of a model of 64 positions

SMALL: dict[str, Any] = {"adapter": "lora", "adapter_options": {}, "core_learning_rate": None, "max_train_steps": 1}
SMALL |= {"gen_length": 12, "generation_steps": None}


@pytest.fixture(autouse=True)
def _fresh() -> Iterator[None]:
    yield
    fresh_accelerate()


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
        main(text_arguments(tmp_path, **SMALL | changes))
    assert not (tmp_path / "run").exists()


def test_samples_beyond_the_positions_that_virtual_tokens_leave_are_refused(tmp_path: Path) -> None:
    changes = {"adapter": "prompt_tuning", "adapter_options": {"num_virtual_tokens": 30}, "gen_length": 20}
    with pytest.raises(ValueError, match=r"together \d+, and the model has 34 positions"):
        main(text_arguments(tmp_path, **SMALL | changes))


RULE = {"remasking": "entropy", "entropy_bound": 0.1, "top_p": 0.9, "confidence_eos_eot_inf": True}


@pytest.mark.parametrize(("given", "block"), [({}, 4), ({"block_length": 6, "evaluation_options": RULE}, 6)])
def test_report_and_card_have_the_evaluation_options_and_the_block_length_of_the_models_own_chat(
    given: dict[str, Any], block: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(decoding.CHAT_BLOCK_LENGTHS, "llama", 4)
    asked: list[dict[str, Any]] = []
    watched = lambda *args, **how: asked.append(how) or exact_match(*args, **how)  # noqa: E731
    monkeypatch.setattr(before_after, "exact_match", watched)
    main(text_arguments(tmp_path, **SMALL | given))
    expected = {"block_length": block, **given.get("evaluation_options", {})}
    assert [{name: how[name] for name in expected} for how in asked] == [expected] * 2
    card = (tmp_path / "run" / "README.md").read_text()
    said = ", remasking='entropy', entropy_bound=0.1, confidence_eos_eot_inf=True)" if given else ")"
    assert f"generate(model, prompt, gen_length=12, block_length={block}{', top_p=0.9' if given else ''}{said}" in card
    assert f"gen_length 12 in {12 // block} blocks" in card
