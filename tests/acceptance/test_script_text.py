"""A run of dllm.py from its command line: what it writes, and that the model card's code loads what was trained."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from peft import PeftModel
from torch import Tensor

from nara_diffusion import NaraConfig, noise_level
from nara_diffusion.dllm import (
    AnswerCollator,
    encode_records,
    exact_match,
    load_backbone,
    noise_level_curve,
    read_records,
)
from nara_diffusion.training.report import advice
from tests.acceptance._commands import ROOT, by_the_card, metrics, names, results, run, tensors
from tests.acceptance._runs import ASSETS, TEXT, text_flags

IDS = torch.tensor([[65, 70, 283, 283, 80, 283]])
SHORT: dict[str, Any] = {"max_train_steps": 2, "checkpointing_steps": None, "curve_points": 1}


@pytest.fixture(scope="module")
def flags(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return text_flags(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def finished(flags: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run of six steps, which was measured after the third, too."""
    folder = tmp_path_factory.mktemp("run") / "out"
    run("dllm.py", **{**flags, "validation_steps": 3}, output_dir=folder)
    return folder


def logits(model: Any, level: float) -> Tensor:
    with torch.no_grad(), noise_level(model, level):
        return model.eval()(IDS).logits


def test_run_writes_its_files(finished: Path, flags: dict[str, Any]) -> None:
    promised = {"adapter_config.json", TEXT, "README.md", "config.yaml", "results.json", "metrics.jsonl"}
    assert promised | {"noise_level_curve.png", "samples.jsonl"} <= names(finished)
    assert {name for name in names(finished) if name.startswith("checkpoint")} == {"checkpoint-4", "checkpoint-6"}
    assert not [name for name in names(finished) if name.startswith(".")]  # nothing half written
    figures = results(finished)
    whats, whens = ("exact_match", "validation_loss", "curve"), ("before", "after")
    measured = {f"{metric}_{when}" for metric in whats for when in whens}
    assert measured | {"seconds", "n", "noise_levels", "adapter", "trainable_parameters"} <= figures.keys()
    assert (figures["n"], figures["adapter"]) == (4, "nara")
    assert figures["seconds"] > 0
    saved = yaml.safe_load((finished / "config.yaml").read_text())
    assert [saved[name] for name in ("rank", "lora_alpha", "seed", "gen_length")] == [3, 5.0, 0, 8]
    questions, answered = (
        [json.loads(line)["instruction"] for line in file.read_text().splitlines()]
        for file in (flags["test_file"], finished / "samples.jsonl")
    )
    assert answered == questions


def test_run_logs_its_losses(finished: Path) -> None:
    lines = metrics(finished)
    steps = [line for line in lines if "loss" in line]
    assert [line["step"] for line in steps] == [1, 2, 3, 4, 5, 6]
    assert [steps[-1][name] for name in ("learning_rate", "core_learning_rate")] == [0, 0]  # the cosine's end
    assert steps[0]["core_learning_rate"] == pytest.approx(steps[0]["learning_rate"] / 10)
    validations = [line for line in lines if "validation_loss" in line]
    assert [line["step"] for line in validations] == [3, 6]
    assert validations[-1]["validation_loss"] == pytest.approx(results(finished)["validation_loss_after"], rel=1e-5)


def test_trained_adapter_is_a_peft_folder(finished: Path, flags: dict[str, Any]) -> None:
    config = NaraConfig.from_pretrained(finished)
    assert (config.r, config.lora_alpha, config.noise_convention) == (3, 5.0, "masked_share")
    saved = tensors(finished)
    assert {value.dtype for value in saved.values()} == {torch.float32}
    trained = [value for name, value in saved.items() if "lora_B" in name]
    assert len(trained) == 3 * 2
    assert all(value.abs().max() > 0 for value in trained)
    model = PeftModel.from_pretrained(load_backbone(str(flags["pretrained_model_name_or_path"]))[0], finished)
    assert (logits(model, 0.1) - logits(model, 0.9)).abs().max() > 0  # its core has moved


def test_card_code_runs_on_the_measured_model(
    finished: Path, flags: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    scope = by_the_card(finished, until="(nothing)")
    assert capsys.readouterr().out.strip() != ""
    model, tokenizer = scope["model"], scope["tokenizer"]
    test, validation = (
        encode_records(read_records(flags[name]), tokenizer, max_length=40).rows
        for name in ("test_file", "validation_file")
    )
    figures, found_curve = results(finished), {}
    end = tokenizer.eos_token_id
    collator = AnswerCollator(end, "gen_length", gen_length=8)
    options: dict[str, Any] = {"collator": collator, "batch_size": 4, "seed": 0, "progress": False}
    for when in ("after", "before"):
        share = exact_match(model, tokenizer, test, gen_length=8, steps=4, progress=False).score
        assert figures[f"exact_match_{when}"] == share
        curve = noise_level_curve(model, validation, figures["noise_levels"], **options)
        assert figures[f"curve_{when}"] == pytest.approx(curve, rel=1e-4)
        found_curve[when] = curve
        model = load_backbone(str(flags["pretrained_model_name_or_path"]))[0]
    assert found_curve["after"] != pytest.approx(found_curve["before"], rel=1e-3)


def test_figures_that_training_does_not_improve_get_advice() -> None:
    good = {"validation_loss_before": 1.0, "validation_loss_after": 0.5}
    for changed, sentence in [
        ({}, []),
        ({"validation_loss_after": 1.0}, ["validation loss"]),
        ({"validation_loss_after": float("nan")}, ["validation loss"]),
        ({"exact_match_before": 0.0, "exact_match_after": 0.0}, ["Exact match"]),
        ({"exact_match_before": 0.5, "exact_match_after": 0.25}, ["Exact match"]),
        ({"exact_match_before": 1.0, "exact_match_after": 1.0}, []),
        ({"similarity_before": 0.4, "similarity_after": 0.3}, ["samples"]),
        ({"similarity_before": None, "similarity_after": None}, []),
    ]:
        lines = advice({**good, **changed})
        assert len(lines) == len(sentence)
        assert all(word in line for word, line in zip(sentence, lines, strict=True))


NO_CORE: dict[str, Any] = {"core_learning_rate": None, "adapter_options": {}}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("adapter", "changes"),
    [
        ("lora", NO_CORE),
        ("nara_dora", {}),
        ("nara", {"pretrained_model_name_or_path": ASSETS / "dream-tiny"}),
        ("full", NO_CORE | {"lora_alpha": None}),
    ],
)
def test_other_adapter_runs_load_by_card(
    flags: dict[str, Any], tmp_path: Path, adapter: str, changes: dict[str, Any]
) -> None:
    out = tmp_path / "out"
    base = load_backbone(str((flags | changes)["pretrained_model_name_or_path"]))[0]
    run("dllm.py", **{**flags, **SHORT, **changes, "adapter": adapter, "learning_rate": 1e-3}, output_dir=out)
    model = by_the_card(out, until="prompt =")["model"]
    figures = results(out)
    assert figures["adapter"] == adapter
    assert figures["curve_after"] != pytest.approx(figures["curve_before"], rel=1e-5)
    if adapter == "full":
        weights = tensors(out)
        assert type(model) is type(base)
        assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items() if name in weights)
        assert figures["trainable_parameters"] == sum(parameter.numel() for parameter in base.parameters())
        return
    config = json.loads((out / "adapter_config.json").read_text())
    assert (config["peft_type"], config["use_dora"]) == (adapter[:4].upper(), adapter == "nara_dora")
    assert any("magnitude" in name for name in tensors(out)) is config["use_dora"]
    with torch.no_grad():
        logits_after = logits(model, 0.5) if adapter != "lora" else model.eval()(IDS).logits
        assert (logits_after - base(IDS).logits).abs().max() > 1e-5


SMALL = {"llada": "llada-tiny", "dream": "dream-tiny", "diffusiongemma": "gemma-tiny"}
LARGE = [path for path in sorted((ROOT / "train_scripts/configs").glob("*.yaml")) if path.stem.split("_")[0] in SMALL]
LARGE = [path for path in LARGE if not path.stem.endswith("_tiny")]


@pytest.mark.slow
@pytest.mark.parametrize("path", LARGE, ids=lambda path: path.stem)
def test_larger_model_settings_run_on_the_small_one(flags: dict[str, Any], tmp_path: Path, path: Path) -> None:
    """With its own settings, except for what the small model or a computer without a GPU doesn't have."""
    out, family = tmp_path / "out", path.stem.split("_")[0]
    changes = {name: flags[name] for name in ("train_file", "validation_file", "test_file", "eval_batch_size")}
    changes |= {"pretrained_model_name_or_path": ASSETS / SMALL[family], "mixed_precision": "no"}
    changes |= {"max_length": 40, "gen_length": 16, "validation_samples": None}
    changes |= {} if family == "diffusiongemma" else {"generation_steps": 4}
    run("dllm.py", **changes, **SHORT, config=path, num_train_epochs=None, output_dir=out)
    settings, saved = (yaml.safe_load(file.read_text()) for file in (path, out / "config.yaml"))
    unchanged = settings.keys() - changes.keys() - SHORT.keys() - {"num_train_epochs"}
    assert {name: saved.get(name) for name in unchanged} == {name: settings[name] for name in unchanged}
    figures = results(out)
    assert figures["exact_match_after"] is not None
    assert any(tensor.any() for name, tensor in tensors(out).items() if "lora_B" in name)
