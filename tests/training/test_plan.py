"""--plan: its figures against the same counter on real runs, what it writes, and the flags that it names."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from accelerate.state import AcceleratorState
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from nara_diffusion.dllm import AnswerCollator
from nara_diffusion.dllm import train as text
from nara_diffusion.dreambooth import train as images
from nara_diffusion.training.arguments import OPTIMIZERS
from nara_diffusion.training.command import parse_arguments
from nara_diffusion.training.live_storages import tensors_of
from nara_diffusion.training.optimization import build_optimizer
from nara_diffusion.training.planned_step import StepCounter, optimizer_bytes
from nara_diffusion.training.run import start_run

ASSETS = Path(__file__).parents[2] / "examples" / "assets"
PROMPT, GEN_LENGTH = 20, 12


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """The shipped models' folders without their weights and tokenizers."""
    root = tmp_path_factory.mktemp("configurations")
    for name in ("llada-tiny", "sdxl-tiny", "sd-tiny-flow"):
        for file in (ASSETS / name).rglob("*.json"):
            if file.name in ("config.json", "scheduler_config.json", "model_index.json"):
                target = root / name / file.relative_to(ASSETS / name)
                target.parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(file, target)
    return root


def text_words(model, *more):
    return [
        "--pretrained_model_name_or_path",
        str(model),
        "--target_modules",
        "all-linear",
        "--gen_length",
        "12",
        *more,
    ]


def planned(module, words):
    kind = text.Arguments if module is text else images.DreamBoothArguments
    return module.main(parse_arguments(kind, [*words, "--plan"], defaults=module.shipped_run))


def counted_run(module, args, monkeypatch):
    """The highest live storages of the training loop of a real run, and its adapter's optimizer states."""
    found = []

    def counted(run, parts, loss, validate):
        with StepCounter(tensors_of(parts.model)) as counter:
            original(run, parts, loss, validate)
        states = [value for state in parts.optimizer.state.values() for value in state.values()]
        found.extend([counter.peak, sum(value.nbytes for value in states if value.dim())])

    AcceleratorState._reset_state(True)  # the precision of an earlier test would stay
    original = module.train
    monkeypatch.setattr(module, "train", counted)
    with start_run(args, "run", module.write_checkpoint) as run:
        module.FineTuning(args, run).train()
    return found


@pytest.mark.parametrize(
    "flags", [["--mixed_precision", "bf16"], ["--gradient_checkpointing", "--lora_dropout", "0.1"]]
)
def test_plan_of_a_text_run_is_what_the_run_holds(flags, folders, tmp_path, monkeypatch):
    lines = [json.dumps({"instruction": chr(97 + i) * PROMPT, "output": "bca"[: 1 + i % 3]}) for i in range(20)]
    (tmp_path / "data.jsonl").write_text("\n".join(lines))
    words = ["--train_batch_size", "8", "--max_length", "40", "--gen_length", str(GEN_LENGTH), *flags]
    words += ["--train_file", str(tmp_path / "data.jsonl"), "--validation_samples", "2", "--max_train_steps", "1"]
    words += ["--min_noise_level", "0.999", "--validation_steps", "none", "--checkpointing_steps", "none"]
    real = text_words(ASSETS / "llada-tiny", "--output_dir", str(tmp_path / "out"), *words)
    args = parse_arguments(text.Arguments, real)
    widths = []
    collate = AnswerCollator.__call__

    def measured(self, rows):
        batch = collate(self, rows)
        widths.append((batch["input_ids"].shape[1], max(int(n) for n in batch["prompt_lengths"])))
        return batch

    monkeypatch.setattr(AnswerCollator, "__call__", measured)
    peak, states = counted_run(text, args, monkeypatch)
    prompt = max(prompt for _, prompt in widths)
    figures = planned(
        text, [*text_words(folders / "llada-tiny"), *words, "--data_options", f"max_prompt_length={prompt}"]
    )
    assert figures["activations"] == pytest.approx(peak, rel=0.02)
    assert figures["optimizer"] == states


def test_plan_of_an_image_run_is_what_the_run_holds(folders, tmp_path, monkeypatch):
    words = ["--resolution", "64", "--train_batch_size", "12", "--max_train_steps", "1", "--validation_steps", "none"]
    words += ["--instance_data_dir", str(ASSETS / "subject"), "--instance_prompt", "a photo of sks toy"]
    words += [
        "--checkpointing_steps",
        "none",
        "--adapter",
        "nara_dora",
        "--target_modules",
        "to_q",
        "to_out.0",
    ]
    real = ["--pretrained_model_name_or_path", str(ASSETS / "sdxl-tiny"), *words, "--output_dir", str(tmp_path / "out")]
    args = parse_arguments(images.DreamBoothArguments, real, defaults=images.shipped_run)
    peak, states = counted_run(images, args, monkeypatch)
    figures = planned(images, ["--pretrained_model_name_or_path", str(folders / "sdxl-tiny"), *words])
    assert figures["activations"] == pytest.approx(peak, rel=0.03)
    assert figures["optimizer"] == states


def test_plan_needs_no_data_and_writes_nothing(folders, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    figures = planned(text, text_words(folders / "llada-tiny"))
    shown = capsys.readouterr().out
    assert "trainable parameters" in shown
    assert f"{figures['peak'] / 1e9:.2f} GB" in shown
    words = ["--pretrained_model_name_or_path", str(folders / "sd-tiny-flow"), "--resolution", "64"]
    assert planned(images, words)["weights"] > 0
    words = [
        "--pretrained_model_name_or_path",
        str(folders / "sdxl-tiny"),
        "--resolution",
        "64",
        "--train_text_encoder",
    ]
    assert planned(images, words)["trainable"] > planned(images, words[:-1])["trainable"]
    assert list(tmp_path.iterdir()) == []


def test_plan_with_a_size_names_flags_that_fit(folders, capsys):
    words = text_words(folders / "llada-tiny", "--train_batch_size", "8", "--load_in_8bit")
    needed = planned(text, [*words, "--train_batch_size", "1", "--gradient_accumulation_steps", "8"])["peak"] / 1e9
    for size, word in (
        (needed * 1.01, "--train_batch_size 1 --gradient_accumulation_steps 8 does"),
        (1e-6, "Lower --max_l"),
    ):
        args = parse_arguments(text.Arguments, [*words, "--plan", str(size)])
        text.main(args)
        assert word in capsys.readouterr().out
    text.main(parse_arguments(text.Arguments, [*words, "--plan", "1"]))
    assert "It fits into 1 GB" in capsys.readouterr().out


@pytest.mark.parametrize(("words", "message"), [
    (["--plan", "0"], "plan must be above 0"),
    (["--plan", "nan"], "plan must be above 0"),
    (["--plan", "big"], "expected a number"),
    (["--plan", "--check"], "give one"),
])  # fmt: skip
def test_wrong_size_is_refused(words, message, folders, capsys):
    with pytest.raises(SystemExit):
        parse_arguments(text.Arguments, [*text_words(folders / "llada-tiny"), *words])
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("name", [name for name in OPTIMIZERS if name != "AdamW8bit"])
def test_optimizer_bytes_are_those_of_its_states(name):
    model = get_peft_model(
        nn.Sequential(nn.Linear(40, 24), nn.Linear(24, 36)), LoraConfig(r=6, target_modules=["0", "1"])
    )
    args = parse_arguments(text.Arguments, [*text_words("x"), "--train_file", "x", "--optimizer", name])
    for parameter in model.parameters():
        nn.init.normal_(parameter)  # prodigy keeps nothing of a zero
    optimizer = build_optimizer(model, args)
    model(torch.randn(5, 40)).square().sum().backward()
    optimizer.step()
    states = [value for state in optimizer.state.values() for value in state.values()]
    held = sum(value.nbytes for value in states if isinstance(value, torch.Tensor) and value.dim())
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    assert optimizer_bytes(trained, name) == held


def test_flops_are_those_of_pytorch_and_attention_counts():
    model, x = nn.Linear(24, 36), torch.randn(5, 24)
    with FlopCounterMode(display=False) as expected:
        model(x).sum().backward()
    with StepCounter() as counter:
        model(x).sum().backward()
    assert counter.flops == expected.get_total_flops() > 0
    q, k = torch.randn(2, 3, 7, 16), torch.randn(2, 3, 11, 16)
    with StepCounter() as counter:
        nn.functional.scaled_dot_product_attention(q, k, k)
    assert counter.flops == 2 * 2 * (2 * 3 * 7 * 11 * 16)
