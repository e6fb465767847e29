"""Arguments from flags, from YAML, and from both; mistakes in one line; the settings that are shipped."""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

import nara_command
from nara_diffusion.dllm.text_arguments import Arguments
from nara_diffusion.dreambooth.image_arguments import DreamBoothArguments
from nara_diffusion.training.command import ArgumentParser, parse_arguments
from tests.acceptance._commands import ROOT, refusal, run
from tests.acceptance._runs import text_flags
from tests.helpers.small_pipelines import small_flux, small_sd3, small_sdxl

CONFIGS = sorted((ROOT / "train_scripts" / "configs").glob("*.yaml"))
TEXT_CONFIGS = [path for path in CONFIGS if path.stem.startswith(("llada", "dream_", "diffusiongemma"))]
IMAGE_CONFIGS = [path for path in CONFIGS if path not in TEXT_CONFIGS]
NEEDED = {
    Arguments: ["--pretrained_model_name_or_path", "x", "--train_file", "y"],
    DreamBoothArguments: ["--pretrained_model_name_or_path", "x", "--instance_data_dir", "y"],
}


@pytest.fixture(autouse=True)
def _folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a script writes where no folder is named lies in a folder of the test."""
    monkeypatch.chdir(tmp_path)


def parse(*argv: str, cls: Any = Arguments, **options: Any) -> Any:
    return parse_arguments(cls, [*NEEDED[cls], *argv], **options)


def test_flags_are_read() -> None:
    for argv, expected in [
        ([], {"rank": 8, "core_learning_rate": None, "complementary": False, "curve_points": 10}),
        (["--rank", "3", "--core-learning-rate=1e-4", "--complementary"], {"rank": 3, "core_learning_rate": 1e-4}),
        (["--complementary", "true", "--load_in_8bit", "False"], {"complementary": True, "load_in_8bit": False}),
        (["--complementary", "--no-complementary"], {"complementary": False}),
        (["--max_grad_norm", "none", "--mixed_precision", "none"], {"max_grad_norm": None, "mixed_precision": None}),
        (["--target_modules", "q,k", "v"], {"target_modules": ["q", "k", "v"]}),
        (["--evaluation_options", "top_p=0.5", "logits_eos_inf=true"], {"top_p": 0.5, "logits_eos_inf": True}),
        (["--evaluation_options", "top_p=0.5", "--evaluation_options", '{"curve_points": 4}'], {"curve_points": 4}),
        (["--evaluation_options", "top_p=none"], {"top_p": None}),
    ]:
        args = parse(*argv)
        assert {name: getattr(args, name) for name in expected} == expected
    sentences = ["a dog, on grass", "a cat"]
    assert parse("--validation_prompts", *sentences, cls=DreamBoothArguments).validation_prompts == sentences


def test_mistake_is_said_in_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    for argv, said in [
        (["--rnk", "3"], "unrecognized --rnk: did you mean --rank?"),
        (["--zzz", "3"], "unrecognized --zzz: --help_all lists the known ones."),
        (["--rank", "3.5"], "argument --rank is '3.5', expected a whole number"),
        (["--rank", "0"], "rank must be at least 1, got 0."),
        (["--lora_dropout", "1"], "lora_dropout must be in [0, 1), got 1.0."),
        (["--min_noise_level", "0.8", "--max_noise_level", "0.2"], "min_noise_level and max_noise_level: "),
        (["--lr_scheduler", "c"], "argument --lr_scheduler: 'c' is none of linear, "),
        (["--complementary", "perhaps"], "perhaps"),
        (["--evaluation_options", "top=1"], "evaluation_options has no 'top': did you mean top_p?"),
        (["--evaluation_options", "curve_points=deep"], "evaluation_options: curve_points is 'deep', expected a whole"),
        (["--evaluation_options", "remasking=low"], "evaluation_options: remasking: 'low' is none of low_confidence"),
        (["--evaluation_options", "top_p"], "expected NAME=VALUE, got 'top_p'"),
        (["--top_p", "1"], "--top_p: give --evaluation_options top_p=VALUE."),
        (["stray"], "unrecognized arguments: stray"),
        (["--config", "none.yaml"], "--config none.yaml can't be read as YAML"),
    ]:
        assert said in refusal(capsys, "dllm.py", *NEEDED[Arguments], *argv)
    assert list(Path().iterdir()) == []  # nothing was begun


def test_file_is_read_as_the_flags_that_it_stands_for(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "a.yaml"
    file.write_text(
        "rank: 5\nmax_grad_norm: null\ncomplementary: true\ntarget_modules: [q, k]\n"
        "evaluation_options: {curve_points: 7, logits_eos_inf: true}\n"
    )
    args = parse("--rank", "2", "--config", str(file), "--evaluation_options", "logits_eos_inf=false")
    assert (args.rank, args.max_grad_norm, args.complementary, args.target_modules) == (2, None, True, ["q", "k"])
    assert (args.curve_points, args.logits_eos_inf) == (7, False)
    for content, said in {
        "rank: true": "rank is 'true', expected a whole number",
        "rank: [3, 4]": "rank is '[3, 4]', expected a whole number",
        "rnk: 1": "did you mean --rank",
        "- rank": "must hold `key: value` lines, got list",
        "rank: [": "can't be read as YAML",
    }.items():
        file.write_text(content)
        with pytest.raises(SystemExit):
            parse("--config", str(file))
        assert f"--config {file}" in (shown := capsys.readouterr().err)
        assert said in shown


def test_defaults_of_a_run_lie_under_flags_and_files() -> None:
    defaults = lambda given: {} if "rank" in given else {"rank": 4, "curve_points": 9}  # noqa: E731
    args = parse("--evaluation_options", "logits_eos_inf=true", defaults=defaults)
    assert (args.rank, args.curve_points, args.logits_eos_inf) == (4, 9, True)
    assert parse("--rank", "2", defaults=defaults).curve_points == 10


def test_help_has_groups_defaults_and_units_and_hides_rare_options(capsys: pytest.CaptureFixture[str]) -> None:
    for flag, rare in (("--help", False), ("--help_all", True)):
        with pytest.raises(SystemExit):
            parse(flag)
        text = capsys.readouterr().out
        assert all(part in " ".join(text.split()) for part in ("Adapter:", "Optimization:", "[samples] (default: 4)"))
        assert ("--complementary" in text) is rare
        length = text[text.index("--max_train_steps") : text.index("--learning_rate")]
        assert "500 steps" in length  # as an image run takes: no default of one epoch is shown
        assert length.count("(default: none)") == 2


@pytest.mark.parametrize(("cls", "most"), [(Arguments, 62), (DreamBoothArguments, 75)])
def test_scripts_have_few_options_and_help_fewer(cls: type, most: int) -> None:
    actions = [action for action in ArgumentParser(cls)._actions if action.dest not in ("help", "help_all")]
    assert len({action.dest for action in actions}) <= most
    assert len({action.dest for action in actions if action.help is not argparse.SUPPRESS}) <= 40


def test_epochs_that_are_given_take_the_place_of_steps_from_below(tmp_path: Path) -> None:
    """A file or a shipped run with max_train_steps would otherwise win over --num_train_epochs without a word."""
    steps = {"max_train_steps": 9, "train_file": "own.jsonl", "pretrained_model_name_or_path": "none"}
    file = tmp_path / "own.yaml"
    file.write_text(yaml.safe_dump(steps))
    epochs, both = ["--num_train_epochs", "2"], ["--num_train_epochs", "2", "--max_train_steps", "5"]
    for more, expected in (([], (9, None)), (epochs, (None, 2.0)), (both, (5, 2.0))):
        of_defaults = parse_arguments(Arguments, more, defaults=lambda _: steps)
        of_file = parse_arguments(Arguments, ["--config", str(file), *more])
        assert [(args.max_train_steps, args.num_train_epochs) for args in (of_defaults, of_file)] == [expected] * 2


# ---------------------------------------------------------------- shipped settings


@pytest.mark.parametrize("path", TEXT_CONFIGS, ids=lambda path: path.stem)
def test_shipped_settings_for_text_are_read(capsys: pytest.CaptureFixture[str], path: Path) -> None:
    """As far as the file of data, which is downloaded separately."""
    said = refusal(capsys, "dllm.py", "--config", str(path), "--mixed_precision", "no")  # as there is no GPU
    settings = yaml.safe_load(path.read_text())
    assert settings["train_file"] in said
    assert settings["trained_padding"] == "gen_length"  # the canvas of generation
    assert list(Path().iterdir()) == []


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """{settings: a tiny pipeline of the classes that they are for}."""
    kinds: dict[str, Any] = {"sd3_dreambooth": small_sd3, "flux_dreambooth": small_flux, "sdxl_dreambooth": small_sdxl}
    kinds |= {"sd_tiny_flow": small_sd3, "sdxl_tiny": small_sdxl}
    kinds |= {"sdxl_4_steps": small_sdxl, "sdxl_tiny_4_steps": small_sdxl, "sd_tiny_flow_4_steps": small_sd3}
    folders = {}
    for name, make in kinds.items():
        folders[name] = tmp_path_factory.mktemp(name)
        make().save_pretrained(folders[name])
    return folders


@pytest.mark.parametrize("path", IMAGE_CONFIGS, ids=lambda path: path.stem)
def test_shipped_settings_for_images_are_read(
    capsys: pytest.CaptureFixture[str], path: Path, models: dict[str, Path]
) -> None:
    """As far as the folder of images, or the file of prompts."""
    script = "dreambooth_sdxl.py" if path.stem.startswith("sdxl") else "dreambooth.py"
    flags = {"pretrained_model_name_or_path": models[path.stem], "mixed_precision": "no"}
    data = "prompts_file" if path.stem.endswith("4_steps") else "instance_data_dir"
    flags |= {data: "nowhere", "similarity_model": None, "alignment_model": None}
    said = refusal(capsys, script, "--config", str(path), **flags, instance_prompt="a photo of sks dog")
    assert "nowhere" in said
    assert list(Path().iterdir()) == []


def test_run_without_a_folder_gets_a_numbered_one_and_no_other_run_s(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    flags = {**text_flags(tmp_path), "max_train_steps": 1, "checkpointing_steps": None, "test_samples": 1}
    for number in (1, 2):
        run("dllm.py", **flags)
        assert (tmp_path / "outputs" / f"dllm-{number}" / "results.json").is_file()
    first = Path("outputs") / "dllm-1"
    before = {path: path.read_bytes() for path in first.iterdir()}
    assert str(first) in refusal(capsys, "dllm.py", **flags, output_dir=first)
    assert {path: path.read_bytes() for path in first.iterdir()} == before


# ---------------------------------------------------------------- before anything slow is imported


@pytest.mark.parametrize(
    ("script", "flag", "meant"),
    [
        ("dllm.py", "--rnk", "--rank"),
        ("dreambooth.py", "--resolutoin=64", "--resolution"),
        ("dreambooth_sdxl.py", "--no-centre_crop", "--center_crop"),
    ],
)
def test_mistyped_flag_is_refused_before_torch_is_imported(tmp_path: Path, script: str, flag: str, meant: str) -> None:
    (tmp_path / "torch.py").write_text("raise SystemExit('torch was imported')")
    environment = os.environ | {"PYTHONPATH": os.pathsep.join((str(tmp_path), str(ROOT)))}
    command = [sys.executable, ROOT / "train_scripts" / script, flag]
    ran = subprocess.run(command, env=environment, capture_output=True, text=True)
    name = flag.partition("=")[0]
    assert (ran.returncode, ran.stderr) == (2, f"error: unrecognized {name}: did you mean {meant}?\n")


def test_other_mistakes_and_known_flags_are_left_to_the_parser() -> None:
    words = [
        "--rank=3",
        "--no_random_flip",
        "--config",
        "file.yaml",
        "--help_all",
        "--prompt",
        "--lr",
        "--zzz",
        "stray",
    ]
    assert nara_command.refuse_typos(words, nara_command.IMAGE_FLAGS) is None
