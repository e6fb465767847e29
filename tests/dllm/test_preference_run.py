"""dllm.py --objective dpo: what a run logs and reports, how it resumes, its plan, and what it refuses."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from random import Random
from typing import Any

import pytest

from nara_diffusion.dllm import train as text
from nara_diffusion.dllm.kinds.block_kind import BLOCKS
from nara_diffusion.dllm.kinds.canvas_kind import CANVAS
from nara_diffusion.dllm.text_arguments import Arguments
from tests.acceptance._commands import assert_same_bits, metrics, results, run
from tests.acceptance._runs import ASSETS, block_flags, small_llada, text_flags
from tests.helpers.plans import planned, text_words

DPO: dict[str, Any] = {"objective": "dpo", "dpo_draws": 3, "dpo_beta": 0.5}
SHORT = {"max_train_steps": 2, "checkpointing_steps": 1, "validation_steps": 1, "test_samples": 1, "curve_points": 1}


def write_pairs(path: Path, count: int, seed: int) -> Path:
    """Words of unequal lengths to write in capitals; the rejected answers are small, and shorter."""
    draw, lines = Random(seed), []
    for _ in range(count):
        word = "".join(draw.choices("abcdefghijklmnopqrstuvwxyz", k=draw.randint(3, 6)))
        pair = {"prompt": f"upper: {word}", "chosen": word.upper(), "rejected": word[draw.randint(0, 1) :]}
        lines.append(json.dumps(pair) + "\n")
    path.write_text("".join(lines))
    return path


def arguments(folder: Path, flags: dict[str, Any], **changes: Any) -> Arguments:
    values: dict[str, Any] = flags | {"output_dir": folder / "run"} | DPO | SHORT | changes
    texts: dict[str, Any] = {name: str(value) for name, value in values.items() if isinstance(value, Path)}
    return Arguments(**values | texts)


def flags_of(folder: Path) -> dict[str, Any]:
    files = {}
    for seed, (name, count) in enumerate((("train", 12), ("validation", 5), ("test", 2))):
        files[f"{name}_file"] = write_pairs(folder / f"{name}.jsonl", count, seed)
    return text_flags(folder) | files


def test_preference_run_logs_reports_and_resumes_exactly(tmp_path: Path) -> None:
    """With dropout, which the reference doesn't have; the resumed run finds the losses of step 1 not yet logged."""
    flags = flags_of(tmp_path) | {"logging_steps": 2, "train_batch_size": 2, "gradient_accumulation_steps": 2}
    figures = text.main(arguments(tmp_path, flags))
    out = tmp_path / "run"
    assert figures == results(out)
    assert figures["validation_loss_before"] == pytest.approx(math.log(2))
    assert (figures["validation_margin_before"], figures["validation_accuracy_before"]) == (0.0, 0.5)
    assert figures["validation_margin_after"] > 0
    assert figures["validation_loss_after"] < math.log(2)
    first, trained, last = metrics(out)
    assert first.keys() == {"step", "validation_loss", "validation_margin", "validation_accuracy"}
    assert {"loss", "margin", "accuracy"} < trained.keys()
    assert trained["loss"] < math.log(2)
    assert last["validation_margin"] == pytest.approx(figures["validation_margin_after"])
    card = (out / "README.md").read_text()
    accuracy = figures["validation_accuracy_after"]
    assert f"| preference accuracy | 50.0% | {accuracy:.1%} |" in card
    assert "Preference accuracy is the share of pairs" in card

    again = tmp_path / "again"
    shutil.copytree(out / "checkpoint-1", again / "checkpoint-1")
    shutil.copy(out / "metrics.jsonl", again)
    text.main(arguments(tmp_path, flags, output_dir=again, resume_from_checkpoint=str(again / "checkpoint-1")))
    assert_same_bits(out, again)


@pytest.mark.slow
def test_plan_counts_forwards_of_policy_and_reference(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The step of 12 rows of the default objective, and its forward again without the adapter."""
    words = [*text_words(small_llada(tmp_path)), "--max_length", "20", "--trained_padding", "0"]
    dpo = planned(text, [*words, "--train_batch_size", "2", "--objective", "dpo", "--dpo_draws", "3"])
    assert "12 x 20 tokens, and the reference's without gradients, a forward" in capsys.readouterr().out
    rows = planned(text, [*words, "--train_batch_size", "12"])
    assert dpo["peak"] == rows["peak"]
    reference = dpo["flops"] - rows["flops"]
    assert 0.25 < reference / rows["flops"] < 0.5  # a backward of frozen weights costs about a forward


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"complementary": True}, "complementary is True, and objective dpo has no such choice"),
        ({"train_on": "all"}, "train_on is all"),
        ({"min_noise_level": 0.2}, "min_noise_level is 0.2"),
        ({"adapter": "full"}, "adapter is full, and the reference of objective dpo is the base"),
        ({"init_adapter": "sft"}, "init_adapter is 'sft', .*: merge a LoRA into the base first"),
        ({"dpo_draws": 0}, "dpo_draws"),
        ({"dpo_beta": 0.0}, "dpo_beta"),
    ],
)
def test_flags_without_meaning_for_preferences_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message) as error:
        Arguments(**{"pretrained_model_name_or_path": "none", "train_file": "none", **DPO, **changes})
    assert "\n" not in str(error.value)


def test_preferences_are_refused_for_canvases_only() -> None:
    flags = Arguments(pretrained_model_name_or_path="none", train_file="none", objective="dpo")
    with pytest.raises(ValueError, match="objective is dpo, and DiffusionGemma has its own: leave it out"):
        CANVAS.objective(flags)
    assert BLOCKS.objective(flags) == {"complementary": False}


@pytest.mark.slow
@pytest.mark.parametrize("model", ["blocks", "dream-tiny"])
def test_preferences_of_other_families_learn(tmp_path: Path, model: str) -> None:
    flags = block_flags(tmp_path) if model == "blocks" else flags_of(tmp_path)
    if model == "blocks":
        for name in ("train", "validation", "test"):
            path = flags[f"{name}_file"]
            rows = [json.loads(line) for line in path.read_text().splitlines()]
            pairs = [{"prompt": r["instruction"], "chosen": r["output"], "rejected": "w22 w20"} for r in rows]
            path.write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    else:
        flags["pretrained_model_name_or_path"] = ASSETS / model
    figures = text.main(arguments(tmp_path, flags, max_train_steps=8, learning_rate=3e-2, checkpointing_steps=None))
    assert figures["validation_loss_before"] == pytest.approx(math.log(2), abs=1e-5)
    assert figures["validation_accuracy_after"] > 0.75


@pytest.mark.slow
def test_shipped_model_learns_preferences_of_unseen_words(tmp_path: Path) -> None:
    """Of two copies of a word, the one with more capitals is chosen. The model alone writes small letters."""
    draw, lines = Random(0), []
    for _ in range(400):
        word = "".join(draw.choices("abcdefghijklmnopqrstuvwxyz", k=6))
        few, many = ("".join(c.upper() if draw.random() < share else c for c in word) for share in (0.1, 0.4))
        lines.append(json.dumps({"prompt": f"copy: {word}", "chosen": many, "rejected": few}) + "\n")
    (tmp_path / "pairs.jsonl").write_text("".join(lines))
    flags = {"train_file": tmp_path / "pairs.jsonl", "objective": "dpo", "dpo_draws": 4, "max_train_steps": 40}
    flags |= {"train_batch_size": 8, "learning_rate": 5e-3, "gen_length": 8, "curve_points": 2, "test_samples": 8}
    run("dllm.py", **flags, checkpointing_steps=None, output_dir=tmp_path / "out")
    figures = results(tmp_path / "out")
    assert figures["validation_accuracy_before"] == 0.5
    assert figures["validation_accuracy_after"] > 0.75
    lines = [json.loads(line) for line in (tmp_path / "out" / "samples.jsonl").read_text().splitlines()]
    capitals = {side: sum(map(str.isupper, "".join(line[side] for line in lines))) for side in ("before", "after")}
    assert capitals["after"] > capitals["before"]
