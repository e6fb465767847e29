"""Arguments from flags, from YAML, and from both; mistakes in one line; the settings that are shipped."""

from __future__ import annotations

import argparse
import dataclasses
import gc
import os
import re
import resource
import runpy
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from nara_diffusion.dllm import decoding
from nara_diffusion.dllm.record_forms import FIELDS
from nara_diffusion.dllm.text_arguments import Arguments
from nara_diffusion.dreambooth.families import TRANSFORMER_TARGETS
from nara_diffusion.dreambooth.image_arguments import DreamBoothArguments
from nara_diffusion.training.run import Run
from nara_flags.hints import COUNTERPARTS
from nara_flags.images import UNET_TARGETS
from nara_flags.imports import lasting_imports
from nara_flags.parser import ArgumentParser, parse_arguments
from nara_flags.text import REMASKING
from tests.acceptance._commands import ROOT, refusal, run
from tests.acceptance._runs import text_flags
from tests.helpers.pipelines.edits import small_kontext
from tests.helpers.pipelines.families import FAMILY_PIPELINES
from tests.helpers.small_pipelines import small_flux, small_sd3, small_sdxl

CONFIGS = sorted((ROOT / "train_scripts" / "configs").glob("*.yaml"))
TEXT_CONFIGS = [path for path in CONFIGS if path.stem.startswith(("llada", "dream_", "diffusiongemma"))]
IMAGE_CONFIGS = [path for path in CONFIGS if path not in TEXT_CONFIGS]
CORE: dict[str, Any] = {"core_scale": 4, "use_rslora": True}
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


def test_dicts_of_an_older_file_are_read(tmp_path: Path) -> None:
    file = tmp_path / "a.yaml"
    file.write_text("evaluation_options: {curve_points: 7, top_p: 0.5}\nmodel_options: {}\ndata_options: null\n")
    args = parse("--config", str(file), "--curve_points", "8")
    assert (args.curve_points, args.top_p, args.revision) == (8, 0.5, None)


def test_flags_are_read() -> None:
    for argv, expected in [
        ([], {"rank": 8, "core_learning_rate": None, "complementary": False, "curve_points": 10}),
        (["--rank", "3", "--core-learning-rate=1e-4", "--complementary"], {"rank": 3, "core_learning_rate": 1e-4}),
        (["--complementary", "true", "--logits_eos_inf", "No"], {"complementary": True, "logits_eos_inf": False}),
        (["--complementary", "--no-complementary"], {"complementary": False}),
        (["--max_grad_norm", "none", "--mixed_precision", "none"], {"max_grad_norm": None, "mixed_precision": None}),
        (["--target_modules", "q,k", "v"], {"target_modules": ["q", "k", "v"]}),
        (
            ["--adapter_options", "core_scale=1e-4", "use_rslora=true"],
            {"adapter_options": {"core_scale": 1e-4, "use_rslora": True}},
        ),
        (
            ["--adapter_options", "use_rslora=true", "--adapter_options", "core_scale=4"],
            {"adapter_options": {"use_rslora": True, "core_scale": 4}},
        ),
        (["--optimizer_options", "eps=none"], {"optimizer_options": {"eps": None}}),
        (["--top_p", "none"], {"top_p": None}),
    ]:
        args = parse(*argv)
        assert {name: getattr(args, name) for name in expected} == expected
    sentences = ["a dog, on grass", "a cat"]
    assert parse("--validation_prompts", *sentences, cls=DreamBoothArguments).validation_prompts == sentences


@pytest.mark.parametrize(
    ("words", "steps", "interval"),
    [
        ([], 500, 125),  # four times a run
        ([], 6, 2),
        ([], 1, 1),
        (["--validation_steps", "7"], 6, 7),
        (["--validation_steps", "0.5"], 7, 4),
        (["--validation_steps", "none"], 6, None),
    ],
)
def test_validation_interval_may_be_a_share_of_run(words: list[str], steps: int, interval: int | None) -> None:
    args = parse(*words, cls=DreamBoothArguments)
    engine: Any = None
    run_of_images = Run(engine, args, "dreambooth", engine, None, Path(), {})
    run_of_images.total_steps = steps
    assert run_of_images.validation_steps == interval
    assert parse().validation_steps == 100  # a text run's loss is cheap


def test_mistake_is_said_in_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    for argv, message in [
        (["--rnk", "3"], "unrecognized --rnk: did you mean --rank?"),
        (["--zzz", "3"], "unrecognized --zzz: --help_all lists the known ones."),
        (["--rank", "3.5"], "argument --rank is '3.5', expected a whole number"),
        (["--rank", "0"], "argument --rank must be at least 1, got 0."),
        (["--validation_steps", "2.5"], "--validation_steps must be a whole number of steps, or a share below 1, got"),
        (["--lora_dropout", "1"], "lora_dropout must be in [0, 1), got 1.0."),
        (["--max_noise_level", "1.5"], "argument --max_noise_level must be in [0, 1], got 1.5."),
        (["--top_p", "0"], "argument --top_p must be above 0 and at most 1, got 0.0."),
        (["--min_noise_level", "0.8", "--max_noise_level", "0.2"], "min_noise_level and max_noise_level: "),
        (["--lr_scheduler", "c"], "argument --lr_scheduler: 'c' is none of linear, "),
        (["--complementary", "perhaps"], "argument --complementary is 'perhaps', expected true or false"),
        (["--adapter_options", "use_dora"], "argument --adapter_options: expected NAME=VALUE, got 'use_dora'"),
        (["--data_options", "top_p=1"], "unrecognized --data_options: here it is a flag for each of its options"),
        (["--steps", "9"], "unrecognized --steps: here it is --max_train_steps"),
        (["--flip_aug"], "unrecognized --flip_aug: --help_all lists the known ones."),  # no text has --random_flip
        (["--rank"], "argument --rank: expected one argument"),
        (["stray"], "unrecognized arguments: stray"),
        (["--config", "none.yaml"], "--config none.yaml can't be read as YAML"),
    ]:
        line = refusal(capsys, "dllm.py", *NEEDED[Arguments], *argv)
        assert line.startswith("error: ")
        assert message in line
    assert list(Path().iterdir()) == []  # nothing was begun


def test_file_is_read_as_the_flags_it_replaces(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "a.yaml"
    file.write_text(
        "rank: 5\nmax_grad_norm: null\ncomplementary: true\ntarget_modules: [q, k]\n"
        "curve_points: 7\nlogits_eos_inf: true\n"
    )
    args = parse("--rank", "2", "--config", str(file), "--no_logits_eos_inf")
    assert (args.rank, args.max_grad_norm, args.complementary, args.target_modules) == (2, None, True, ["q", "k"])
    assert (args.curve_points, args.logits_eos_inf) == (7, False)
    for content, message in {
        "rank: -1": "rank must be at least 1, got -1.",
        "rank: true": "rank is 'true', expected a whole number",
        "rank: [3, 4]": "rank is '[3, 4]', expected a whole number",
        "rnk: 1": "did you mean --rank",
        "- rank": "must hold `key: value` lines, got list",
        "rank: [": "can't be read as YAML",
    }.items():
        file.write_text(content)
        with pytest.raises(SystemExit):
            parse("--config", str(file))
        assert f"--config {file}" in (printed := capsys.readouterr().err)
        assert message in printed


def test_run_defaults_lie_below_flags_and_files() -> None:
    defaults = lambda given: {} if "rank" in given else {"rank": 4, "curve_points": 9}  # noqa: E731
    args = parse("--logits_eos_inf", defaults=defaults)
    assert (args.rank, args.curve_points, args.logits_eos_inf) == (4, 9, True)
    assert parse("--rank", "2", defaults=defaults).curve_points == 10


def test_help_has_groups_and_hides_rare_options(capsys: pytest.CaptureFixture[str]) -> None:
    for flag, rare in (("--help", False), ("--help_all", True)):
        with pytest.raises(SystemExit):
            parse(flag)
        text = capsys.readouterr().out
        assert all(part in " ".join(text.split()) for part in ("Adapter:", "Optimization:", "[samples] (default: 4)"))
        assert ("--complementary" in text) is rare
        length = text[text.index("--max_train_steps") : text.index("--learning_rate")]
        assert "500 steps" in length  # as an image run takes: no default of one epoch is shown
        assert length.count("(default: none)") == 2


@pytest.mark.parametrize("cls", [Arguments, DreamBoothArguments])
def test_help_shows_few_options(cls: type) -> None:
    actions = ArgumentParser(cls)._actions
    assert len({action.dest for action in actions if action.help is not argparse.SUPPRESS}) <= 42


def test_epochs_replace_steps_from_a_lower_source(tmp_path: Path) -> None:
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
    message = refusal(capsys, "dllm.py", "--config", str(path), "--mixed_precision", "no")  # as there is no GPU
    settings = yaml.safe_load(path.read_text())
    assert settings["train_file"] in message
    assert settings["trained_padding"] == "gen_length"  # the canvas of generation
    assert list(Path().iterdir()) == []


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """{settings: a tiny pipeline of the classes that they are for}."""
    kinds: dict[str, Any] = {"sd3_dreambooth": small_sd3, "flux_dreambooth": small_flux, "sdxl_dreambooth": small_sdxl}
    kinds |= {"sd_tiny_flow": small_sd3, "sdxl_tiny": small_sdxl, "kontext_tiny": small_kontext}
    for family in ("flux", "flux2", "qwen_image", "wan"):
        kinds |= {f"{family}_{card}gb": FAMILY_PIPELINES[family] for card in (12, 16, 24)}
    kinds |= {"sdxl_4_steps": small_sdxl, "sdxl_tiny_4_steps": small_sdxl, "sd_tiny_flow_4_steps": small_sd3}
    folders = {}
    saved: dict[Any, Path] = {}
    for name, make in kinds.items():
        if make not in saved:
            saved[make] = tmp_path_factory.mktemp(name)
            make().save_pretrained(saved[make])
        folders[name] = saved[make]
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
    message = refusal(capsys, script, "--config", str(path), **flags, instance_prompt="a photo of sks dog")
    assert "nowhere" in message
    assert list(Path().iterdir()) == []


def test_run_without_folder_gets_a_new_number(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    flags = {**text_flags(tmp_path), "max_train_steps": 1, "checkpointing_steps": None, "test_samples": 1}
    for number in (1, 2):
        run("dllm.py", **flags)
        assert (tmp_path / "outputs" / f"dllm-{number}" / "results.json").is_file()
    first = Path("outputs") / "dllm-1"
    files = {path: path.read_bytes() for path in first.iterdir()}
    assert str(first) in refusal(capsys, "dllm.py", **flags, output_dir=first)
    assert {path: path.read_bytes() for path in first.iterdir()} == files


# ---------------------------------------------------------------- before anything slow is imported


@pytest.mark.parametrize(
    ("script", "words", "said"),
    [
        ("dllm.py", "--rnk 3", "error: unrecognized --rnk: did you mean --rank?"),
        ("dllm.py", "--max_length 0", "error: argument --max_length must be at least 1, got 0."),
        ("dreambooth.py", "--with_prior_preservation", "here it is --class_data_dir and --class_prompt"),
        ("dreambooth.py", "--zzz", "error: unrecognized --zzz: --help_all lists the known ones."),
        ("dreambooth_sdxl.py", "--weighting_scheme x", "error: argument --weighting_scheme: 'x' is none of none, "),
        ("dreambooth_sdxl.py", "--help", "Teach Stable Diffusion XL"),
    ],
)
def test_script_answers_before_slow_imports(tmp_path: Path, script: str, words: str, said: str) -> None:
    for name in ("torch", "transformers", "diffusers", "peft", "numpy", "nara_diffusion"):
        (tmp_path / f"{name}.py").write_text(f"raise SystemExit('{name} was imported')")
    environment = os.environ | {"PYTHONPATH": os.pathsep.join((str(tmp_path), str(ROOT)))}
    command = [sys.executable, ROOT / "train_scripts" / script, *words.split()]
    earlier = resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime
    ran = subprocess.run(command, env=environment, capture_output=True, text=True)
    seconds = resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime - earlier
    text = ran.stdout if words == "--help" else ran.stderr
    assert said in text
    assert ran.returncode == (0 if words == "--help" else 2)
    assert words == "--help" or text.count("\n") == 1
    assert seconds < 0.5


@pytest.mark.parametrize("name", ["nara_diffusion.dllm.train", "nara_diffusion.dreambooth.train"])
def test_module_shows_the_help_of_its_script(
    name: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delitem(sys.modules, name)  # or runpy warns of a module that is imported already
    monkeypatch.setattr(sys, "argv", ["train.py", "--help"])
    with pytest.raises(SystemExit):
        runpy.run_module(name, run_name="__main__")
    text = capsys.readouterr().out
    assert "accelerate launch train_scripts" in text
    assert "--rank N" in text


# ---------------------------------------------------------------- every option

OPTIONS = sorted({field.name for cls in (Arguments, DreamBoothArguments) for field in dataclasses.fields(cls)})


def names_in(folder: str, pattern: str) -> set[str]:
    """What the groups of a pattern match in the Python files of a folder; this file is left out."""
    paths = [path for path in (ROOT / folder).rglob("*.py") if path != Path(__file__)]
    matches = [match for path in paths for match in re.findall(pattern, path.read_text(encoding="utf-8"))]
    return {name for match in matches for name in match}


def test_package_reads_every_option_and_tests_set_it() -> None:
    by_loop = {f"{part}_field" for part in FIELDS}  # of `load_records`
    read = names_in("nara_diffusion", r"\.(\w+)|\"(\w+)\"") | by_loop
    tested = names_in("tests", r"\"(\w+)\"|\b(\w+)=|--(?:no_)?(\w+)")
    assert [name for name in OPTIONS if name not in read] == []
    assert [name for name in OPTIONS if name not in tested] == []


@pytest.mark.parametrize("cls", [Arguments, DreamBoothArguments])
def test_every_option_is_explained_by_sentences(cls: type) -> None:
    texts = {field.name: field.metadata["help"] for field in dataclasses.fields(cls)}
    assert [name for name, text in texts.items() if not re.fullmatch(r"[A-Zγ].*[.…]", text)] == []


def test_counterparts_of_other_flags_exist_here() -> None:
    flags = {f"--{name}" for name in OPTIONS}
    for here, names in COUNTERPARTS.items():
        assert set(re.findall(r"--\w+", here)) <= flags
        assert not set(names.split()) & set(OPTIONS)


def test_choices_are_those_of_the_library() -> None:
    assert REMASKING == decoding.REMASKING
    assert list(TRANSFORMER_TARGETS) == UNET_TARGETS


@pytest.mark.parametrize("is_enabled", [True, False])
def test_lasting_imports_collect_nothing_and_restore_the_collector(is_enabled):
    was_enabled = gc.isenabled()
    try:
        gc.unfreeze()  # frozen objects that end would change the count
        (gc.enable if is_enabled else gc.disable)()
        with pytest.raises(ImportError), lasting_imports():
            raise ImportError
        assert (gc.isenabled(), gc.get_freeze_count()) == (is_enabled, 0)
        with lasting_imports():
            assert not gc.isenabled()
        assert gc.isenabled() is is_enabled
        assert gc.get_freeze_count() > 0
    finally:
        gc.freeze()  # as tests/conftest.py does
        (gc.enable if was_enabled else gc.disable)()
