"""Dataclasses of arguments from flags, from YAML, and from both; mistakes in one line."""

# ruff: noqa: RUF009 (option() is dataclasses.field() with metadata)
from __future__ import annotations

import argparse
import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml

from nara_diffusion.dllm.text_arguments import Arguments
from nara_diffusion.dreambooth.image_arguments import DreamBoothArguments
from nara_diffusion.training.parser import (
    RENAMED,
    ArgumentParser,
    gathered,
    given_arguments,
    option,
    parse_arguments,
    spread_options,
)


@dataclass
class Base:
    """Shared"""

    rank: int = option(8, "The rank.", unit="directions")
    rate: float | None = option(None, "The rate.")


@dataclass
class Example(Base):
    """Own"""

    fast: bool = option(False, "Be fast.")
    slow: bool = option(True, "Be slow.", rare=True)
    kind: str | None = option("a", "The kind.", choices=("a", "b"))
    names: list[str] = option(["x"], "Names.")
    prompts: list[str] | None = option(None, "Prompts.", sentences=True)
    more: dict[str, Any] = option({}, "More:")
    depth: int | None = option(3, "the depth", within="more")
    words: list[str] | None = option(None, "some words", within="more")
    dry: bool = option(False, "whether it is dry", within="more")

    def __post_init__(self) -> None:
        spread_options(self)
        if self.rank < 1:
            raise ValueError(f"rank must be at least 1, got {self.rank}.")


def parse(*argv: str, **options: Any) -> Example:
    return parse_arguments(Example, list(argv), **options)


@pytest.mark.parametrize(
    ("argv", "expected"),
    [
        ([], {"rank": 8, "rate": None, "fast": False, "slow": True, "names": ["x"], "depth": 3}),
        (["--rank", "3", "--rate=1e-4", "--fast"], {"rank": 3, "rate": 1e-4, "fast": True}),
        (["--fast", "true", "--slow", "False"], {"fast": True, "slow": False}),
        (["--no-slow", "--no-fast"], {"fast": False, "slow": False}),
        (["--rate", "none", "--kind", "none"], {"rate": None, "kind": None}),
        (["--names", "q,k", "v"], {"names": ["q", "k", "v"]}),
        (["--prompts", "a dog, on grass", "a cat"], {"prompts": ["a dog, on grass", "a cat"]}),
        (["--more", "depth=5", "words=a,b", "dry=true"], {"depth": 5, "words": ["a", "b"], "dry": True}),
        (["--more", "depth=5", "--more", '{"words": ["c"]}'], {"depth": 5, "words": ["c"]}),
        (["--more", "depth=none"], {"depth": None}),
    ],
)
def test_flags_are_read(argv: list[str], expected: dict[str, Any]) -> None:
    args = parse(*argv)
    assert {name: getattr(args, name) for name in expected} == expected


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["--rnk", "3"], "unrecognized --rnk: did you mean --rank?"),
        (["--stray", "3"], "unrecognized --stray: --help_all lists the known ones."),
        (["--rank", "3.5"], "argument --rank is '3.5', expected a whole number"),
        (["--rank", "0"], "rank must be at least 1, got 0."),
        (["--kind", "c"], "argument --kind: 'c' is none of a, b"),
        (["--fast", "perhaps"], "perhaps"),
        (["--more", "dept=1"], "more has no 'dept': did you mean depth?"),
        (["--more", "depth=deep"], "more: depth is 'deep', expected a whole number"),
        (["--more", "depth"], "expected NAME=VALUE, got 'depth'"),
        (["--use_8bit_adam"], "--use_8bit_adam: give --optimizer AdamW8bit."),
        (["--no-upcast_vae"], "--upcast_vae: has gone"),
        (["--no_rank"], "unrecognized --no_rank: did you mean --rank?"),
        (["stray"], "unrecognized arguments: stray"),
    ],
)
def test_mistake_is_said_in_one_line(capsys: pytest.CaptureFixture[str], argv: list[str], said: str) -> None:
    with pytest.raises(SystemExit):
        parse(*argv)
    (line,) = [line for line in capsys.readouterr().err.splitlines() if not line.startswith("usage:")]
    assert said in line


def test_file_is_read_as_the_flags_that_it_stands_for(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "a.yaml"
    file.write_text("rank: 5\nrate: null\nfast: true\nnames: [q, k]\nprompts: ['a, b']\nmore: {depth: 7, dry: true}\n")
    args = parse("--rank", "2", "--config", str(file), "--more", "dry=false")
    assert (args.rank, args.fast, args.names, args.prompts, args.depth) == (2, True, ["q", "k"], ["a, b"], 7)
    assert not args.dry
    for content, said in {
        "rank: true": "rank is 'true', expected a whole number",
        "rank: [3, 4]": "rank is '[3, 4]', expected a whole number",
        "rnk: 1": "did you mean --rank",
        "prodigy_beta3: 0.9": "give --optimizer_options beta3=VALUE",
        "- rank": "must hold `key: value` lines, got list",
        "rank: [": "can't be read as YAML",
    }.items():
        file.write_text(content)
        with pytest.raises(SystemExit):
            parse("--config", str(file))
        assert f"--config {file}" in (shown := capsys.readouterr().err)
        assert said in shown


def test_defaults_of_a_run_lie_under_flags_and_files() -> None:
    args = parse("--more", "dry=true", defaults=lambda given: {"rank": 4, "depth": 9} if "rank" not in given else {})
    assert (args.rank, args.depth, args.dry) == (4, 9, True)
    assert parse("--rank", "2", defaults=lambda given: {} if "rank" in given else {"rank": 4}).rank == 2


def test_arguments_are_made_again_from_what_was_given() -> None:
    args = parse("--rank", "2", "--more", "depth=1")
    again = given_arguments(args)
    assert again["more"] == {"depth": 1}
    assert "depth" not in again
    assert Example(**yaml.safe_load(yaml.safe_dump(again))) == args
    assert gathered(Example, {"rank": 1, "depth": 2, "more": {"dry": True}}) == {
        "rank": 1,
        "more": {"dry": True, "depth": 2},
    }


def test_help_has_groups_defaults_and_units_and_hides_rare_options(capsys: pytest.CaptureFixture[str]) -> None:
    for flag, rare in (("--help", False), ("--help_all", True)):
        with pytest.raises(SystemExit):
            parse(flag)
        text = capsys.readouterr().out
        assert all(part in " ".join(text.split()) for part in ("Shared:", "Own:", "[directions] (default: 8)"))
        assert ("Be slow." in text) is rare


@pytest.mark.parametrize(("cls", "most"), [(Arguments, 60), (DreamBoothArguments, 75)])
def test_scripts_have_few_options_and_help_fewer(cls: type, most: int) -> None:
    actions = [action for action in ArgumentParser(cls)._actions if action.dest not in ("help", "help_all")]
    assert len({action.dest for action in actions}) <= most
    assert len({action.dest for action in actions if action.help is not argparse.SUPPRESS}) <= 40


def test_answers_to_old_flags_name_what_the_script_has() -> None:
    for cls in (Arguments, DreamBoothArguments):
        flags = {field.name for field in dataclasses.fields(cls) if field.init}
        assert not flags & RENAMED.keys()
        parser = ArgumentParser(cls)
        titles = [group.title for group in parser._action_groups]
        assert len(titles) == len(set(titles))
    assert parser._advice("lr") == "unrecognized --lr: did you mean --learning_rate?"
    advice = {name: parser._advice(name) for name in ("huber_c", "clip_skip", "crops_per_image")}
    assert "has gone" in advice["huber_c"]
    assert "has gone" in advice["clip_skip"]
    assert advice["crops_per_image"] == "--crops_per_image: give --data_options crops_per_image=VALUE."


def test_epochs_that_are_given_take_the_place_of_steps_from_below(tmp_path: Path) -> None:
    """A file or a shipped run with max_train_steps would otherwise win over --num_train_epochs without a word."""
    steps = {"max_train_steps": 9, "train_file": "own.jsonl", "pretrained_model_name_or_path": "none"}
    file = tmp_path / "own.yaml"
    file.write_text(yaml.safe_dump(steps))
    epochs, both = ["--num_train_epochs", "2"], ["--num_train_epochs", "2", "--max_train_steps", "5"]
    for more, expected in (([], (9, 1.0)), (epochs, (None, 2.0)), (both, (5, 2.0))):
        of_defaults = parse_arguments(Arguments, more, defaults=lambda _: steps)
        of_file = parse_arguments(Arguments, ["--config", str(file), *more])
        assert [(args.max_train_steps, args.num_train_epochs) for args in (of_defaults, of_file)] == [expected] * 2
