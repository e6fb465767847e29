"""--core_module: a custom core in a train script, by a module's name or its file."""

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from nara_diffusion.cores import registry as custom_cores
from nara_diffusion.cores.registry import BUILT_IN
from nara_diffusion.dreambooth.arguments import DreamBoothArguments
from nara_diffusion.training.adapters.custom_core import import_core_module
from nara_diffusion.training.adapters.method_arguments import unread_arguments
from nara_diffusion.training.arguments.cli import build_parser, parse_arguments
from nara_diffusion.training.arguments.common import AdapterArguments
from train_scripts import dllm, dreambooth_sdxl

CORE = """
import torch
from torch import nn

from nara_diffusion import register_core


class Turned(nn.Module):
    def __init__(self, config, rank):
        super().__init__()
        self.P = nn.Parameter(torch.zeros(rank, rank))

    def forward(self, noise_level):
        return torch.linalg.matrix_exp(noise_level[:, None, None] * (self.P - self.P.T))


register_core("turned", Turned)
"""
SCRIPTS = {"dllm": (dllm.Arguments, dllm.shipped_run)}
SCRIPTS["dreambooth"] = (DreamBoothArguments, dreambooth_sdxl.shipped_run)


@pytest.fixture
def module(tmp_path: Path, monkeypatch) -> Iterator[Path]:
    """A file that registers "turned", in a folder that Python doesn't look into; what it leaves is undone."""
    monkeypatch.setattr(custom_cores, "_custom", {})
    monkeypatch.setattr(sys, "path", list(sys.path))
    before = set(sys.modules)
    path = tmp_path / "turned_core.py"
    path.write_text(CORE)
    yield path
    for name in set(sys.modules) - before:
        if str(tmp_path) in str(getattr(sys.modules[name], "__file__", "")):
            del sys.modules[name]


@pytest.mark.parametrize("script", SCRIPTS)
@pytest.mark.parametrize("by_file", [False, True], ids=["flags", "YAML"])
def test_a_script_takes_a_core_that_its_module_registers(script, by_file, module: Path) -> None:
    cls, shipped_run = SCRIPTS[script]
    argv = ["--core_type", "turned", "--core_module", str(module)]
    if by_file:
        file = module.with_suffix(".yaml")
        file.write_text(f"core_type: turned\ncore_module: {module}\n")
        argv = ["--config", str(file)]
    for _ in range(2):  # a second time in one process, as a resumed run in a notebook
        args = parse_arguments(cls, argv, stand_in=shipped_run)
        assert (args.core_type, args.core_module) == ("turned", str(module))
        assert args.core_learning_rate == 1e-3
        assert unread_arguments(args) == []


def test_a_module_that_python_finds_is_given_by_name(module: Path, monkeypatch) -> None:
    monkeypatch.syspath_prepend(module.parent)
    args = parse_arguments(
        dllm.Arguments, ["--core_type", "turned", "--core_module", "turned_core"], None, dllm.shipped_run
    )
    assert args.core_type == "turned"


def test_a_core_that_the_program_has_registered_itself_needs_no_module(module: Path) -> None:
    custom_cores.register_core("mine", lambda config, rank: None)
    assert parse_arguments(dllm.Arguments, ["--core_type", "mine"], stand_in=dllm.shipped_run).core_type == "mine"


def test_a_module_beside_it_can_be_imported(module: Path) -> None:
    (module.parent / "turned_helper.py").write_text("NAME = 'other'\n")
    module.write_text("from turned_helper import NAME\n" + CORE.replace('"turned"', "NAME"))
    import_core_module(str(module))
    assert set(custom_cores.registered_cores()) == {"other"}


def test_help_says_how() -> None:
    text = " ".join(build_parser(AdapterArguments).format_help().split())
    assert "Or a custom core: the name that --core_module registers." in text
    assert "--core_module TEXT" in text


def refusal(capsys, *argv: str) -> str:
    with pytest.raises(SystemExit):
        parse_arguments(dllm.Arguments, argv, stand_in=dllm.shipped_run)
    return capsys.readouterr().err.strip().splitlines()[-1]


def test_an_unknown_core_is_refused_with_what_to_do(module: Path, capsys) -> None:
    message = refusal(capsys, "--core_type", "turned")
    assert "core_type is 'turned': choose one of 'hypernetwork', " in message
    assert "import the module that calls nara_diffusion.register_core('turned', factory)" in message
    assert "train scripts do by --core_module" in message
    message = refusal(capsys, "--core_type", "tunred", "--core_module", str(module))
    assert "core_type is 'tunred': choose one of 'hypernetwork', " in message
    assert f"{BUILT_IN[-1]!r}, 'turned'." in message


def test_a_module_that_cannot_serve_is_refused_by_name(module: Path, capsys, monkeypatch) -> None:
    def message(name: str) -> str:
        return refusal(capsys, "--core_type", "turned", "--core_module", name)

    assert "core_module is 'no/where.py', which is no file." in message("no/where.py")
    monkeypatch.chdir(module.parent)
    assert (
        "core_module is 'turned_core', which can't be imported: ModuleNotFoundError: No module named 'turned_core'. "
        "Give the file, turned_core.py." in message("turned_core")
    )
    found = message("no.where")
    assert "'no.where', which can't be imported: ModuleNotFoundError: No module named 'no'. Give a module that" in found
    assert "core_module is 'json', which registers no core: call nara_diffusion.register_core(" in message("json")
    Path("empty_core.py").write_text("")
    assert "'empty_core.py', which registers no core" in message("empty_core.py")
    Path("broken_core.py").write_text("\nnonsense\n")
    found = message("broken_core.py")
    assert "can't be imported: NameError: name 'nonsense' is not defined (" in found
    assert "broken_core.py, line 2)" in found
    Path("wrong_core.py").write_text("x = = 3\n")
    assert "can't be imported: SyntaxError: invalid syntax (wrong_core.py, line 1)" in message("wrong_core.py")
    Path("my-core.py").write_text(CORE)
    assert "'my-core.py', whose name Python can't import: letters, digits and _ alone" in message("my-core.py")
    Path("json.py").write_text(CORE)
    found = message("json.py")
    assert "core_module is 'json.py', but Python takes the name json for another module, " in found
    assert found.endswith("json/__init__.py: rename the file.")


def test_a_module_without_use_is_named(module: Path, caplog) -> None:
    parse_arguments(dllm.Arguments, ["--core_module", str(module)], stand_in=dllm.shipped_run)
    parse_arguments(dllm.Arguments, ["--core_module", str(module), "--adapter", "lora"], stand_in=dllm.shipped_run)
    assert caplog.messages == [
        "adapter nara with core_type 'hypernetwork' doesn't read core_module",
        "adapter lora doesn't read core_module",
    ]
