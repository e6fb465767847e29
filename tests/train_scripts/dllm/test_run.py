"""train_scripts/dllm.py: what a run writes, and that it means what it says."""

import json
import os
import re
import shutil
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml
from accelerate.state import AcceleratorState
from PIL import Image
from safetensors.torch import load_file

from nara_diffusion import NaraConfig
from nara_diffusion.training.arguments.cli import build_parser, parse_arguments
from tests.helpers.patience import LAST_RESORT
from train_scripts.dllm import Arguments, main

WEIGHTS = "adapter_model.safetensors"
ROOT = Path(__file__).parents[3]


def read_metrics(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def losses(folder: Path) -> list[float]:
    return [line["loss"] for line in read_metrics(folder) if "loss" in line]


@pytest.fixture
def finished(arguments, capsys) -> SimpleNamespace:
    args = arguments()
    results = main(args)
    return SimpleNamespace(args=args, folder=Path(args.output_dir), results=results, screen=capsys.readouterr())


def test_a_run_leaves_all_that_it_promises(finished) -> None:
    assert sorted(entry.name for entry in finished.folder.iterdir()) == [
        "README.md",
        "adapter_config.json",
        WEIGHTS,
        "config.yaml",
        "metrics.jsonl",
        "noise_level_curve.png",
        "results.json",
        "samples.html",
    ]
    results = json.loads((finished.folder / "results.json").read_text())
    assert results == finished.results
    assert results["n"] == 5
    assert results["seconds"] > 0
    assert {type(results[f"exact_match_{when}"]) for when in ("before", "after")} == {float}
    assert results["validation_loss_after"] < results["validation_loss_before"]
    assert results["noise_levels"] == pytest.approx([1 / 3, 2 / 3, 1.0])
    assert len(results["curve_before"]) == len(results["curve_after"]) == 3

    assert NaraConfig.from_pretrained(finished.folder).noise_convention == "masked_share"
    assert any("nara_core." in name for name in load_file(finished.folder / WEIGHTS))
    with Image.open(finished.folder / "noise_level_curve.png") as picture:
        assert picture.size == (1200, 480)
    assert (finished.folder / "samples.html").read_text().count("<tr>") == 1 + 5
    saved = yaml.safe_load((finished.folder / "config.yaml").read_text())
    assert Arguments(**saved) == finished.args


def test_the_screen_shows_progress_and_a_table(finished) -> None:
    bar = finished.screen.err
    assert all(f"{name}=" in bar for name in ("loss", "low λ", "mid λ", "high λ", "lr", "core lr"))
    table = finished.screen.out
    assert re.search(r"before +after\n", table)
    assert re.search(r"exact match \(n = 5\) +\d+\.\d % +\d+\.\d %", table)
    assert str(finished.folder) in table


def test_metrics_hold_losses_by_noise_level_and_validation(finished) -> None:
    lines = read_metrics(finished.folder)
    assert [line["step"] for line in lines if "loss" in line] == [1, 2, 3, 4]
    assert [line["step"] for line in lines if "validation_loss" in line] == [2, 4]
    last = next(line for line in lines if line["step"] == 4 and "validation_loss" in line)
    assert last["validation_loss"] == pytest.approx(finished.results["validation_loss_after"], rel=1e-6)
    assert {"validation_loss_low", "validation_loss_mid", "validation_loss_high"} < last.keys()


def test_the_base_model_is_measured_without_the_adapter(finished, arguments, tmp_path) -> None:
    other = main(arguments(output_dir=str(tmp_path / "other"), max_train_steps=1, seed=9, rank=5))
    assert other["curve_before"] == pytest.approx(finished.results["curve_before"], rel=0.5)
    again = main(arguments(output_dir=str(tmp_path / "again"), max_train_steps=1, rank=5))
    assert again["curve_before"] == finished.results["curve_before"]
    assert again["validation_loss_before"] == finished.results["validation_loss_before"]
    assert again["curve_after"] != finished.results["curve_after"]


def test_the_cards_code_loads_the_adapter_and_runs(finished, capsys) -> None:
    card = (finished.folder / "README.md").read_text()
    assert f"exact match on 5 held-out records | {100 * finished.results['exact_match_before']:.1f} %" in card
    code = re.search(r"```python\n(.*?)```", card, re.DOTALL)[1]
    scope: dict = {}
    exec(code, scope)
    saved = load_file(finished.folder / WEIGHTS)
    loaded = scope["model"].state_dict()
    name = next(name for name in saved if name.endswith("lora_B.weight"))
    torch.testing.assert_close(loaded[name.replace(".weight", ".default.weight")], saved[name], rtol=0, atol=0)
    # greedy generation in the report and in the card's code is the same
    page = (finished.folder / "samples.html").read_text()
    cells = re.findall(r"<td[^>]*>(.*?)</td>", page)
    assert len(cells) == 5 * 4


def test_the_cards_code_names_the_mask_token_where_the_model_does_not(arguments, llada_folder, tmp_path) -> None:
    folder = tmp_path / "unnamed"
    shutil.copytree(llada_folder, folder)
    for name, field in (("config.json", "mask_token_id"), ("tokenizer_config.json", "mask_token")):
        fields = json.loads((folder / name).read_text())
        del fields[field]
        (folder / name).write_text(json.dumps(fields))
    args = arguments(pretrained_model_name_or_path=str(folder), mask_token="<|mdm_mask|>", max_train_steps=1)
    main(args)
    card = (Path(args.output_dir) / "README.md").read_text()
    scope: dict = {}
    exec(re.search(r"```python\n(.*?)```", card, re.DOTALL)[1], scope)
    assert (
        scope["model"].config.mask_token_id == json.loads((llada_folder / "config.json").read_text())["mask_token_id"]
    )


def test_a_resumed_run_ends_with_the_same_bytes(arguments, tmp_path) -> None:
    common = {"lora_dropout": 0.1, "gradient_accumulation_steps": 2, "train_batch_size": 2, "complementary": True}
    whole = arguments(output_dir=str(tmp_path / "whole"), **common)
    main(whole)
    stopped = arguments(checkpointing_steps=2, **common)
    main(stopped)
    folder = Path(stopped.output_dir)
    assert (folder / WEIGHTS).read_bytes() == (tmp_path / "whole" / WEIGHTS).read_bytes()
    (folder / WEIGHTS).unlink()
    argv = ["--config", str(folder / "config.yaml"), "--resume_from_checkpoint", str(folder / "checkpoint-2")]
    main(parse_arguments(Arguments, argv))
    assert (folder / WEIGHTS).read_bytes() == (tmp_path / "whole" / WEIGHTS).read_bytes()
    assert losses(folder) == losses(tmp_path / "whole")


@pytest.mark.parametrize(
    "changes",
    [
        {"gradient_checkpointing": True},
        {"train_batch_size": 2, "gradient_accumulation_steps": 2},
        {"dataloader_num_workers": 2},
    ],
)
def test_what_changes_nothing(arguments, tmp_path, changes: dict) -> None:
    main(arguments(output_dir=str(tmp_path / "plain")))
    main(arguments(**changes))
    torch.testing.assert_close(losses(tmp_path / "run"), losses(tmp_path / "plain"), rtol=1e-5, atol=1e-6)
    one, other = load_file(tmp_path / "run" / WEIGHTS), load_file(tmp_path / "plain" / WEIGHTS)
    for name, value in one.items():
        torch.testing.assert_close(value, other[name], rtol=1e-3, atol=1e-5)


def test_bf16_changes_little(arguments, tmp_path) -> None:
    main(arguments(output_dir=str(tmp_path / "plain")))
    AcceleratorState._reset_state(True)  # a process has one precision
    main(arguments(mixed_precision="bf16"))
    torch.testing.assert_close(losses(tmp_path / "run"), losses(tmp_path / "plain"), rtol=0.05, atol=0)
    assert {value.dtype for value in load_file(tmp_path / "run" / WEIGHTS).values()} == {torch.float32}


@pytest.mark.parametrize(
    "changes",
    [
        {"use_dora": True},
        {"core_type": "constant"},
        {"core_type": "identity"},
        {"core_input": "both", "core_sharing": "layer", "noise_embedding": "mlp"},
        {"core_start_step": 2, "trained_padding": "longest"},
        {"trained_padding": "max_length", "remasking": "random", "temperature": 0.7, "block_length": 2},
    ],
    ids=lambda changes: ",".join(f"{name}={value}" for name, value in changes.items()),
)
def test_variants_train(arguments, changes: dict) -> None:
    results = main(arguments(**changes))
    assert results["validation_loss_after"] < results["validation_loss_before"]


@pytest.mark.parametrize(
    ("changes", "title", "tag", "noise"),
    [
        ({"core_type": "identity"}, "A low-rank adapter (LoRA, arXiv 2106.09685)", "lora", False),
        ({"core_type": "rank_mask"}, "A noise-aware low-rank adapter (T-LoRA, arXiv 2507.05964)", "tlora", True),
        ({"core_type": "constant"}, "A noise-aware low-rank adapter (NaRA-C, arXiv 2605.29716)", "nara", False),
    ],
    ids=["identity", "rank_mask", "constant"],
)
def test_the_card_names_what_the_adapter_really_is(arguments, changes, title, tag, noise) -> None:
    args = arguments(**changes, max_train_steps=1, curve_points=1, test_samples=1, validation_steps=None)
    main(args)
    card = (Path(args.output_dir) / "README.md").read_text()
    assert title in card
    assert yaml.safe_load(card.split("---\n")[1])["tags"][0] == tag
    name = title.partition("(")[2].partition(",")[0]
    assert f" with {name}\n" in card
    assert f"- adapter: {name}\n" in card
    assert ("tells the adapter λ" in card) is noise


def test_two_processes_give_the_losses_of_one(arguments, tmp_path) -> None:
    """On the same global batch, with accelerate's own launcher; masks and λ are those of the samples."""
    main(arguments(output_dir=str(tmp_path / "one"), train_batch_size=4))
    config = tmp_path / "two.yaml"
    config.write_text(yaml.safe_dump(asdict(arguments(output_dir=str(tmp_path / "two"), train_batch_size=2))))
    command = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2"]
    command += ["--main_process_port", "0", str(ROOT / "train_scripts" / "dllm.py"), "--config", str(config)]
    environment = {**os.environ, "ACCELERATE_USE_CPU": "true", "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, timeout=LAST_RESORT)
    assert done.returncode == 0, done.stderr[-3000:]
    torch.testing.assert_close(losses(tmp_path / "two"), losses(tmp_path / "one"), rtol=1e-5, atol=1e-6)
    one, two = (json.loads((tmp_path / name / "results.json").read_text()) for name in ("one", "two"))
    assert two["n"] == one["n"] == 5
    for name in ("exact_match_before", "exact_match_after", "validation_loss_after", "curve_before", "curve_after"):
        assert two[name] == pytest.approx(one[name], rel=1e-4), name
    weights = load_file(tmp_path / "two" / WEIGHTS)
    for name, value in load_file(tmp_path / "one" / WEIGHTS).items():
        torch.testing.assert_close(weights[name], value, rtol=1e-3, atol=1e-5)


def test_a_push_happens_at_the_end(arguments, uploads, capsys) -> None:
    main(arguments(push_to_hub=True, hub_model_id="mine", max_train_steps=1))
    assert len(uploads) == 1
    assert {"README.md", WEIGHTS, "results.json"} < uploads[0]
    assert "pushed to https://huggingface.co/me/mine" in capsys.readouterr().out


def test_runs_without_a_named_folder_are_numbered(arguments, tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    for number in (1, 2):
        main(arguments(output_dir=None, max_train_steps=1))
        assert (tmp_path / "outputs" / f"dllm-{number}" / WEIGHTS).is_file()


def test_help_names_every_flag_of_the_issue() -> None:
    text = build_parser(Arguments, "").format_help()
    flags = (
        "pretrained_model_name_or_path dataset_name train_file validation_file output_dir rank lora_alpha lora_dropout "
        "target_modules use_dora core_scale max_length train_batch_size gradient_accumulation_steps max_train_steps "
        "num_train_epochs learning_rate core_learning_rate lr_scheduler lr_warmup_steps mixed_precision "
        "gradient_checkpointing checkpointing_steps checkpoints_total_limit resume_from_checkpoint validation_steps "
        "report_to seed push_to_hub config core_start_step"
    )
    for flag in flags.split():
        assert re.search(rf"--{flag}\b", text), flag
    groups = [
        "Model and data:",
        "Adapter:",
        "Optimization:",
        "Objective and evaluation:",
        "Run, checkpoints and reports:",
    ]
    positions = [text.index(group) for group in groups]
    assert positions == sorted(positions)
    assert "(default: q_proj,k_proj,v_proj,o_proj)" in text


def test_a_folder_of_data_is_read_by_datasets(arguments, data, tmp_path) -> None:
    folder = tmp_path / "set"
    folder.mkdir()
    records = [json.loads(line) for line in Path(data["train_file"]).read_text().splitlines()]
    renamed = [{"q": record["instruction"], "a": record["output"]} for record in records]
    (folder / "train.jsonl").write_text("".join(json.dumps(record) + "\n" for record in renamed))
    args = arguments(
        dataset_name=str(folder),
        train_file=None,
        validation_file=None,
        test_file=None,
        validation_samples=4,
        test_samples=2,
        instruction_field="q",
        output_field="a",
        max_train_steps=1,
    )
    assert main(args)["n"] == 2
