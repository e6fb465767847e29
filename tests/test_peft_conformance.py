"""examples/peft_conformance.py on a few tests of its own, in the place of PEFT's."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from peft_conformance import EXPLAINED, explanation, is_refusal, sort_outcomes

from nara_diffusion import NaraConfig

ROOT = Path(__file__).parents[1]
TESTS = """
import pytest
import torch
from peft import IA3Config, LoraConfig, get_peft_model

def adapted():
    return get_peft_model(torch.nn.Sequential(torch.nn.Linear(3, 3)), LoraConfig(target_modules=["0"]))

def test_runs_at_a_known_level():
    adapted()(torch.randn(2, 3))

def test_refused():
    LoraConfig(target_parameters=["weight"])

def test_refused_with_another_message():
    with pytest.raises(ValueError, match="what PEFT says"):
        LoraConfig(target_parameters=["weight"])

@pytest.mark.parametrize("config_cls", [LoraConfig, IA3Config])
def test_of_a_method(config_cls):
    assert config_cls(target_modules=["0"]).peft_type.value != "IA3"

def test_get_base_model_state_dict():
    assert not any("core" in name for name in adapted().state_dict())

def test_fails_in_lora_too():
    assert LoraConfig().peft_type.value == "IA3"

def test_without_lora():
    assert False
"""
FAILING = """
def test_wrong_with_nara():
    assert LoraConfig().peft_type.value == "LORA"
"""


def counts(folder: Path, tests: str) -> tuple[int, str]:
    """The exit status and the last line of the program on these tests."""
    (folder / "tests").mkdir(parents=True)
    (folder / "tests" / "test_custom_models.py").write_text(tests)
    for name in ("testing_common.py", "testing_utils.py"):
        (folder / "tests" / name).touch()
    command = [sys.executable, str(ROOT / "examples" / "peft_conformance.py"), str(folder)]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    ended = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    return ended.returncode, ended.stdout.rstrip().rpartition("\n")[2]


@pytest.mark.slow
def test_conformance_counts_only_what_lora_passes(tmp_path: Path) -> None:
    line = "2 passed, 1 refused, 1 explained, 2 LoRA's too"
    assert counts(tmp_path / "all", TESTS) == (0, f"{line}, 0 failed")
    assert counts(tmp_path / "failing", TESTS + FAILING) == (1, f"{line}, 1 failed")


def test_refusal_is_our_error_not_failed_assertion() -> None:
    with pytest.raises(ValueError, match="target_parameters") as refused:
        NaraConfig(target_parameters=["weight"])
    assert is_refusal(refused.value)
    with pytest.raises(AssertionError) as mismatch, pytest.raises(ValueError, match="what PEFT says"):
        NaraConfig(target_parameters=["weight"])
    assert not is_refusal(mismatch.value)
    with pytest.raises(ValueError, match="invalid literal") as of_python:
        int("x")
    assert not is_refusal(of_python.value)
    assert not is_refusal(AssertionError("that nobody raised"))


def test_failed_tests_are_explained_by_name() -> None:
    explained = next(iter(EXPLAINED))
    outcomes = {"a": "passed", "b": "refused", f"test_{explained}[c]": "failed", "d": "failed", "e": "failed"}
    kinds = sort_outcomes(outcomes | {"f": "skipped"}, ["d"])
    assert list(kinds.values()) == [["a"], ["b"], [f"test_{explained}[c]"], ["d"], ["e"]]
    assert explanation("test_merge_layers") is None
