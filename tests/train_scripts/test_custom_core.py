"""a custom core from the command line: trained, resumed, loaded as the card says, and evaluated."""

import re
import sys
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file

from nara_diffusion import noise_level
from nara_diffusion.cores import registry as custom_cores
from nara_diffusion.lm_eval.load_model import load_model
from nara_diffusion.training.main import run_command
from train_scripts import dllm, dreambooth_sdxl

from .dreambooth_runs import WEIGHTS, loaded_pipeline, tiny_arguments

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "cores.md").read_text(encoding="utf-8")
ADAPTER = "adapter_model.safetensors"


@pytest.fixture
def module(tmp_path: Path, monkeypatch) -> Iterator[Path]:
    """The module that docs/cores.md shows; what importing it leaves is undone."""
    monkeypatch.setattr(custom_cores, "_custom", {})
    monkeypatch.setattr(sys, "path", list(sys.path))
    path = tmp_path / "my_cores.py"
    path.write_text(re.search(r"```python\n# my_cores.py\n(.*?)```", PAGE, re.DOTALL)[1])
    yield path
    forget("my_cores")


def forget(name: str) -> None:
    """As a new program starts: the module isn't imported, no core is registered."""
    sys.modules.pop(name, None)
    custom_cores._custom.clear()


def card_code(folder: Path, end: str) -> dict:
    """What the model card's code leaves, up to `end`."""
    scope: dict = {}
    exec(re.search(rf"```python\n(.*?){end}", (folder / "README.md").read_text(), re.DOTALL)[1], scope)
    return scope


def test_the_command_line_trains_resumes_and_evaluates_it(arguments, module: Path, monkeypatch, caplog) -> None:
    def run(*flags: str) -> None:
        monkeypatch.setattr(sys, "argv", ["dllm.py", *flags])
        run_command(dllm.main, dllm.Arguments, dllm.__doc__, dllm.SHIPPED_RUN, dllm.shipped_run)

    core = {"core_type": "rotation", "core_module": str(module), "core_learning_rate": 0.1}
    fast = {"checkpointing_steps": 2, "curve_points": 1, "test_samples": 2, "validation_steps": None}
    values = asdict(arguments(**fast)) | core
    config, folder = module.with_name("run.yaml"), Path(values["output_dir"])
    config.write_text(yaml.safe_dump({name: value for name, value in values.items() if name not in core}))
    flags = [text for name, value in core.items() for text in (f"--{name}", str(value))]
    run("--config", str(config), *flags)
    assert not [line for line in caplog.messages if "doesn't read" in line]
    card = (folder / "README.md").read_text()
    assert "(NaRA with core 'rotation', arXiv 2605.29716)" in card

    whole = load_file(folder / ADAPTER)
    assert any("nara_core" in name and value.abs().max() > 1e-3 for name, value in whole.items())
    forget("my_cores")
    with pytest.raises(ValueError, match=r"core_type is 'rotation': choose one of .* --core_module"):
        load_model(None, str(folder), device="cpu")
    forget("my_cores")
    run("--config", str(folder / "config.yaml"), "--resume_from_checkpoint", str(folder / "checkpoint-2"))
    resumed = load_file(folder / ADAPTER)
    assert resumed.keys() == whole.keys()
    assert all(torch.equal(resumed[name], value) for name, value in whole.items())

    assert "import my_cores  # registers core_type 'rotation'\n" in card
    by_card = card_code(folder, "prompt =")["model"]
    evaluated, _ = load_model(None, str(folder), device="cpu")
    ids = torch.arange(3, 18).view(3, 5)
    levels = torch.tensor([0.1, 0.5, 0.9])
    with torch.no_grad(), noise_level(by_card, levels), noise_level(evaluated, levels):
        assert torch.equal(by_card(ids).logits, evaluated(ids).logits)
        logits = evaluated(ids).logits
    with torch.no_grad(), noise_level(evaluated, levels.flip(0)):
        assert (evaluated(ids).logits - logits).abs().max() > 1e-4


def test_an_image_run_trains_it_and_a_pipeline_loads_it(sdxl_folder, pictures, module: Path, tmp_path: Path) -> None:
    fast = {"num_validation_images": 1, "curve_points": 1, "max_train_steps": 2, "train_text_encoder": True}
    output = tmp_path / "run"
    core = {"core_type": "rotation", "core_module": str(module), "use_dora": True}
    args = tiny_arguments(sdxl_folder, pictures, output, **core, **fast)
    dreambooth_sdxl.main(args)
    assert any("nara_core" in name for name in load_file(output / WEIGHTS))
    card = (output / "README.md").read_text()
    assert "(NaRA-DoRA with core 'rotation', arXiv 2605.29716)" in card
    assert "import my_cores  # registers core_type 'rotation'\npipe.load_nara_weights(" in card
    card_code(output, "image = pipe")
    forget("my_cores")
    with pytest.raises(
        ValueError, match=r"core_type is 'rotation': choose one of .* first import the module that calls"
    ):
        loaded_pipeline(args)
