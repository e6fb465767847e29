"""The canvas that a text adapter is trained on is the one that it generates on, and a run says so where it isn't;
dllm.py's lengths, and its blocks, those of the model's own chat, in report and card."""

from __future__ import annotations

import json
import logging
import random
import re
from collections.abc import Callable
from pathlib import Path
from string import ascii_lowercase
from typing import Any
from unittest.mock import Mock

import pytest
import torch

from nara_diffusion.dllm import exact_match, text_report
from nara_diffusion.dllm.kinds import masked_kind
from nara_diffusion.dllm.text_arguments import Arguments
from nara_diffusion.dllm.train import main
from tests.acceptance._commands import metrics
from tests.acceptance._runs import ASSETS, text_arguments  # of a model of 64 positions


@pytest.fixture
def arguments(tmp_path: Path) -> Callable[..., Arguments]:
    """Of runs on words of 2 to 6 letters, each of them a token of an answer, as are the two at its end."""
    defaults: dict[str, Any] = {"lora_dropout": 0.0, "train_batch_size": 1, "gradient_accumulation_steps": 4}
    defaults |= {"max_train_steps": 2, "checkpointing_steps": None}
    defaults |= {"max_length": 64, "gen_length": 12, "generation_steps": None}
    (tmp_path / "other").mkdir()
    return lambda **changes: text_arguments(tmp_path / "other", **{**defaults, **changes})


def test_losses_are_equal_under_any_accumulation(arguments, tmp_path: Path) -> None:
    """The losses of 1 x 4 samples are those of 4 x 1, though each forward is as long as its longest sample."""
    lines, short = [], {"max_train_steps": 1, "validation_steps": 1, "test_samples": 1, "curve_points": 1}
    for size, accumulation in ((1, 4), (4, 1)):
        folder = tmp_path / f"{size}x{accumulation}"
        batches = {"train_batch_size": size, "gradient_accumulation_steps": accumulation, "eval_batch_size": size}
        main(arguments(output_dir=folder, **short, **batches))
        lines.append([line.get("loss", line.get("validation_loss")) for line in metrics(folder)])
    torch.testing.assert_close(*lines, rtol=1e-4, atol=1e-6)


@pytest.mark.slow
def test_further_training_on_known_data_does_no_harm(arguments, tmp_path: Path) -> None:
    """At one sample a forward, as in the 8B configurations, and gen_length far beyond the answers."""
    draw, files = random.Random(0), {"train_file": tmp_path / "more.jsonl", "test_file": tmp_path / "held.jsonl"}
    for file, count in zip(files.values(), (200, 48), strict=True):
        words = ["".join(draw.choices(ascii_lowercase, k=draw.randint(3, 7))) for _ in range(count)]
        records = [{"instruction": f"reverse: {word}", "output": word[::-1]} for word in words]
        file.write_text("".join(json.dumps(record) + "\n" for record in records))
    longer: dict[str, Any] = {
        "gen_length": 32,
        "gradient_accumulation_steps": 8,
        "max_train_steps": 24,
        "eval_batch_size": 48,
    }
    rates = {"learning_rate": 5e-3, "core_learning_rate": None}
    longer["pretrained_model_name_or_path"] = str(ASSETS / "llada-tiny")  # a base that knows the task
    results = main(arguments(**files, **longer, **rates, target_modules=["all-linear"]))
    assert results["exact_match_after"] >= max(results["exact_match_before"], 0.9)


def canvas_warnings(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [r.getMessage() for r in caplog.records if r.levelno == logging.WARNING and "gen_length" in r.getMessage()]


@pytest.mark.parametrize(
    ("changes", "message", "remedy"),
    [
        ({"trained_padding": "6"}, r"11 samples end before that, the shortest after 10 ", "trained_padding gen_length"),
        ({"trained_padding": "longest"}, r"gen_length is 12, and \d+ of 11 samples end", "trained_padding gen_length"),
        ({"trained_padding": "8"}, None, ""),
        ({"gen_length": 7}, None, ""),
        ({"gen_length": 6}, r"gen_length is 6, and \d+ of 11 samples have longer answers, up to 7 ", "gen_length 7"),
        ({"train_file": "texts.jsonl", "gen_length": 9}, None, ""),  # without a prompt they may be longer
    ],
)
def test_generating_beyond_trained_canvas_warns_before_training(
    arguments, caplog: Any, tmp_path: Path, monkeypatch: Any, changes: dict[str, Any], message: str | None, remedy: str
) -> None:
    (tmp_path / "texts.jsonl").write_text("".join(json.dumps({"text": f"{n} is a number"}) + "\n" for n in range(9)))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("nara_diffusion.dllm.train.train", Mock(side_effect=InterruptedError))
    with pytest.raises(InterruptedError):
        main(arguments(**changes))
    warned = canvas_warnings(caplog)
    assert len(warned) == (message is not None)
    if message is not None:
        assert re.search(message, warned[0])
        assert warned[0].endswith(f"give --{remedy}")


def test_canvas_beyond_positions_is_refused_before_training(arguments, tmp_path: Path) -> None:
    long = [{"instruction": "a" * (38 + n), "output": "b"} for n in range(9)]
    (tmp_path / "own.jsonl").write_text("".join(json.dumps(record) + "\n" for record in long))
    args = arguments(gen_length=30, train_file=tmp_path / "own.jsonl")
    message = r"the longest prompt has \d+ tokens and gen_length is 30, together \d+, but the model has 64"
    message += r".* \(the longest is record [1-9] of .*own\.jsonl\); "
    message += r"--max_prompt_length 34 leaves longer ones out$"
    with pytest.raises(ValueError, match=message):
        main(args)
    assert not Path(args.output_dir).exists()


# ---------------------------------------------------------------- lengths

NO_CORE: dict[str, Any] = {"adapter": "lora", "adapter_options": {}, "core_learning_rate": None, "max_train_steps": 1}


def test_lengths_are_refused_before_a_record_is_tokenised(arguments, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("nara_diffusion.dllm.text_data.encode_records", lambda *_, **__: pytest.fail("tokenised"))
    for changes, message in [
        ({"gen_length": 64}, "gen_length is 64, but the model has 64 positions: lower it"),
        ({"max_length": 65}, "max_length is 65, but the model has 64 positions: lower it"),
        ({"gen_length": 12, "block_length": 5}, "block_length 5 has to divide gen_length 12"),
    ]:
        args = arguments(**changes)
        with pytest.raises(ValueError, match=message):
            main(args)
        assert not Path(args.output_dir).exists()


def test_samples_beyond_remaining_positions_are_refused(arguments) -> None:
    changes = {"adapter": "prompt_tuning", "adapter_options": {"num_virtual_tokens": 30}, "gen_length": 20}
    with pytest.raises(ValueError, match=r"together \d+, but the model has 34 positions"):
        main(arguments(**NO_CORE | changes))


RULE = {"remasking": "entropy", "entropy_bound": 0.1, "top_p": 0.9, "confidence_eos_eot_inf": True}


@pytest.mark.parametrize(("given", "block"), [({}, 4), ({"block_length": 6, **RULE}, 6)])
def test_report_and_card_have_canvas_and_generation_options(
    arguments, caplog: Any, given: dict[str, Any], block: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(masked_kind.CHAT_BLOCKS, "llama", 4)
    calls: list[dict[str, Any]] = []
    watched = lambda *args, **how: calls.append(how) or exact_match(*args, **how)  # noqa: E731
    monkeypatch.setattr(text_report, "exact_match", watched)
    args = arguments(**NO_CORE | given)
    with caplog.at_level(logging.INFO):
        main(args)
    assert canvas_warnings(caplog) == []
    facts = dict(message.split(": ", 1) for message in caplog.messages if ": " in message)  # a line for each
    assert facts["base"] == args.pretrained_model_name_or_path
    assert facts["training data"].endswith(f"{args.train_file} (fields instruction, output, answer)")  # no train_on
    assert "answers 4 to 8, trained to 12 tokens (trained_padding gen_length)" in facts["canvas"]
    expected = {"block_length": block, **given}
    assert [{name: how[name] for name in expected} for how in calls] == [expected] * 3  # with the longest prompt
    card = (Path(args.output_dir) / "README.md").read_text()
    options_in_card = ", remasking='entropy', entropy_bound=0.1, confidence_eos_eot_inf=True)" if given else ")"
    assert (
        f"generate(model, prompt, gen_length=12, block_length={block}{', top_p=0.9' if given else ''}{options_in_card}"
        in card
    )
    assert f"gen_length 12 in {12 // block} blocks" in card
