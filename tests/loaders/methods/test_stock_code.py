"""On plain LoRAs alone, PEFT's and Diffusers' methods run their own code, and give what they give without this package.

Each wrapper asks first whether there is a holder of cores (or a StrengthSchedule, or a scheduler that an adapter
brought); those that read files look at what they have read. Any other function of the package that runs fails the test.
"""

from __future__ import annotations

import inspect
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
import torch
from diffusers.loaders import lora_base, lora_pipeline
from diffusers.loaders import peft as peft_loaders
from diffusers.loaders.lora_base import LoraBaseMixin
from diffusers.loaders.peft import PeftAdapterMixin
from peft import PeftModel
from peft.config import PeftConfigMixin
from peft.tuners.lora import LoraModel
from transformers.integrations.peft import PeftAdapterMixin as TransformersMixin

import nara_diffusion
from nara_diffusion import StrengthSchedule, set_strength
from tests.helpers.small_pipelines import small_sdxl
from tests.loaders.methods.stock_calls import all_calls, save_two_loras

PACKAGE = Path(nara_diffusion.__file__).parent
OWNERS = (
    LoraBaseMixin, PeftAdapterMixin, TransformersMixin, LoraModel, PeftModel, PeftConfigMixin, lora_base, lora_pipeline,
    peft_loaders,
)  # fmt: skip
"""All that the package puts wrappers on."""

CHECKS = {
    "utils/patching.py": {"wrapper"},
    "loaders/patches.py": {
        "_has_holder", "_has_holder_or_gets_schedule", "_language_has_holder_or_gets_schedule",
        "_has_cores", "_has_cores_or_gets_schedule",
    },
    "loaders/lora_files.py": {"fetch_without_cores", "load_lora_metadata", "check_without_cores"},
    "loaders/format.py": {"is_core_key"},
    "loaders/schedulers.py": {"has_replaced_scheduler"},
    "loaders/stand_in.py": {"stands_in_for"},
    "loaders/strengths.py": {"has_functions", "_leaves"},
    "tuner/holder/core_holder.py": {"holder_of"},
    "tuner/patches/lora_model.py": {"_has_holder", "_is_plain_with_holder", "_has_mixed_batch"},
    "tuner/patches/adapter_files.py": {
        "_is_new_nara", "is_naras_folder", "_has_naras", "_has_nara_tuner", "_from_json_file",
    },
    "tuner/patches/transformers_models.py": {"_is_of_nara", "_given", "_model_id", "_hub_options"},
    "tuner/config_files.py": {"is_naras"},
    "export/peft_conversion.py": {"_entry", "convert_adapter", "_has_cores"},
}  # fmt: skip
"""The functions that see whether there is something to do."""


def wrapped_names() -> set[str]:
    found = [inspect.getattr_static(owner, name) for owner in OWNERS for name in vars(owner)]
    functions = [getattr(value, "__func__", value) for value in found]
    return {function.__qualname__ for function in functions if getattr(function, "knows_cores", False)}


@contextmanager
def traced(ran: set[tuple[str, str]], called: set[str]) -> Iterator[None]:
    """Record each function of the package that runs inside, and the original of each wrapper."""

    def record(frame: FrameType, event: str, argument: Any) -> None:
        path = frame.f_code.co_filename
        if event == "call" and path.startswith(str(PACKAGE)):
            name = frame.f_code.co_name
            if name not in ("<genexpr>", "<listcomp>", "<dictcomp>"):
                ran.add((Path(path).relative_to(PACKAGE).as_posix(), name))
            if name == "wrapper":
                called.add(frame.f_locals["original"].__qualname__)

    sys.setprofile(record)
    try:
        yield
    finally:
        sys.setprofile(None)


def beside_checks(ran: set[tuple[str, str]]) -> list[tuple[str, str]]:
    return sorted((path, name) for path, name in ran if name not in CHECKS.get(path, ()))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("loras")
    save_two_loras(folder)
    return folder


def test_plain_loras_run_no_code_of_the_package(folder, tmp_path):
    stock_folder = tmp_path / "stock"
    stock_folder.mkdir()
    for file in folder.iterdir():
        (stock_folder / file.name).write_bytes(file.read_bytes())
    stock = subprocess.Popen(
        [sys.executable, "-m", "tests.loaders.methods.stock_calls", stock_folder],
        cwd=PACKAGE.parent,
        env={**os.environ, "PYTHONPATH": str(PACKAGE.parent)},
    )
    ran: set[tuple[str, str]] = set()
    called: set[str] = set()
    with traced(ran, called):
        found = all_calls(folder)
    assert called == wrapped_names()
    assert beside_checks(ran) == []
    assert stock.wait() == 0
    expected = torch.load(stock_folder / "results.pt")
    assert found.keys() == expected.keys()
    for step, value in expected.items():
        if isinstance(value, str):
            assert found[step] == value
        else:
            torch.testing.assert_close(found[step], value, rtol=0, atol=1e-5, msg=lambda text, at=step: f"{at}: {text}")
    assert not torch.allclose(expected["Diffusers: load a"], expected["Diffusers: base"], atol=1e-2)
    assert not torch.allclose(expected["transformers: loaded"], expected["transformers: base"], atol=1e-2)
    assert not torch.allclose(expected["PEFT: another"], expected["PEFT: one adapter"], atol=1e-2)


@pytest.mark.filterwarnings("ignore:Adapter .* was active which is now deleted")
def test_plain_loras_run_no_code_of_the_package_once_naras_and_schedules_are_gone(folder, nara_folder):
    pipe = small_sdxl()
    pipe.load_nara_weights(nara_folder, "nara")
    pipe.unload_nara_weights()
    pipe.load_lora_weights(folder, weight_name="a.safetensors", adapter_name="a")
    scheduled: set[tuple[str, str]] = set()
    with traced(scheduled, set()):
        pipe.set_adapters("a", StrengthSchedule([(0, 0.2), (1, 0.9)]))
        pipe.disable_lora()
        pipe.enable_lora()
        pipe.set_adapters("a", 0.5)
        set_strength(pipe.unet, "a", None)
    assert {("loaders/strengths.py", "set_weights"), ("loaders/schedulers.py", "follow_adapters")} < scheduled
    ran: set[tuple[str, str]] = set()
    with traced(ran, set()):
        pipe.set_adapters("a", 0.7)
        pipe.disable_lora()
        pipe.enable_lora()
        pipe.delete_adapters("a")
        pipe.unload_lora_weights()
    assert ("loaders/patches.py", "_has_cores") in ran
    assert beside_checks(ran) == []
