"""--adapter in train_scripts/dllm.py: what each method leaves is what a user loads, and a resumed run ends alike."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from peft import PeftModel
from safetensors.torch import load_file

from nara_diffusion.dllm import AnswerCollator, encode_records, load_backbone
from nara_diffusion.dllm.data.encoding import end_token_id
from nara_diffusion.dllm.data.records import FieldNames, records_from_file
from nara_diffusion.dllm.evaluation.before_after import validation_losses
from nara_diffusion.dreambooth.arguments import DreamBoothArguments
from nara_diffusion.training.adapters.configs import adapter_config
from nara_diffusion.training.adapters.methods import METHODS
from nara_diffusion.training.arguments.cli import parse_arguments
from train_scripts import dllm, dreambooth_sdxl
from train_scripts.dllm import Arguments, main

CONFIGS = Path(__file__).parents[3] / "train_scripts" / "configs"
SHORT = {"validation_steps": None, "curve_points": 1, "gen_length": 2, "test_samples": 2, "checkpointing_steps": 2}
# AdaLoRA drops directions at steps 3 and 4 of 4, so that a resumed run has to know what was dropped, and why
OPTIONS = {
    "adalora": {"adapter_options": ["tinit=1", "tfinal=1", "deltaT=1", "init_r=5"]},
    "oft": {"adapter_options": ["oft_block_size=4"]},
    "pissa": {"lora_alpha": 5.0},
    "full": {"learning_rate": 1e-3},
}


RESUMED = ("multi_lora", "pissa", "vera", "adalora", "prompt_tuning", "p_tuning", "full")


def options(adapter: str) -> dict:
    core = {} if METHODS[adapter].family == "nara" else {"core_hidden_dims": [256, 512]}
    return {**SHORT, "adapter": adapter, "num_virtual_tokens": 3, **core, **OPTIONS.get(adapter, {})}


def weights(folder: Path) -> dict[str, torch.Tensor]:
    names = ("adapter_model.safetensors", "model.safetensors")
    return load_file(next(folder / name for name in names if (folder / name).is_file()))


def load(args: Arguments, folder: Path) -> torch.nn.Module:
    """As the model card says."""
    code = re.search(r"```python\n(.*?)prompt =", (folder / "README.md").read_text(), re.DOTALL)[1]
    scope: dict = {}
    exec(code, scope)
    assert isinstance(scope["model"], PeftModel) == (args.adapter != "full")
    return scope["model"]


def validation_loss(args: Arguments, model: torch.nn.Module) -> float:
    """On the script's own rows, λ and masks."""
    _, tokenizer = load_backbone(args.pretrained_model_name_or_path)
    records = records_from_file(args.validation_file, FieldNames("instruction", "input", "output", "answer"))
    rows = encode_records(records, tokenizer, max_length=args.max_length, progress=False).rows
    collator = AnswerCollator(end_token_id(tokenizer), int(args.trained_padding), args.max_length)
    return validation_losses(Accelerator(), model, rows, collator, seed=args.seed, batch_size=4)["validation_loss"]


# PEFT 0.21 takes the names in AdaLoRA's own rank_pattern for those of modules
@pytest.mark.filterwarnings("ignore:The following rank_pattern keys:RuntimeWarning")
@pytest.mark.parametrize("adapter", METHODS)
def test_what_is_saved_is_what_was_trained_and_a_resumed_run_ends_alike(arguments, adapter: str) -> None:
    args = arguments(**options(adapter))
    results = main(args)
    folder = Path(args.output_dir)
    assert results["validation_loss_after"] != results["validation_loss_before"]
    assert results["adapter"] == adapter
    base, _ = load_backbone(args.pretrained_model_name_or_path)
    assert validation_loss(args, base) == pytest.approx(results["validation_loss_before"], rel=1e-6)
    loaded = load(args, folder)
    assert validation_loss(args, loaded) == pytest.approx(results["validation_loss_after"], rel=1e-4)

    if adapter not in RESUMED:
        return
    whole = weights(folder)
    main(arguments(**options(adapter), resume_from_checkpoint=str(folder / "checkpoint-2")))
    resumed = weights(folder)
    assert whole.keys() == resumed.keys()
    for name, value in whole.items():
        torch.testing.assert_close(resumed[name], value, rtol=0, atol=0)


@pytest.mark.parametrize("adapter", METHODS)
def test_one_file_of_arguments_serves_all_methods(adapter: str) -> None:
    """Each of the paper's runs, and DreamBooth's, with another adapter by one flag."""
    for path in sorted(CONFIGS.glob("*.yaml")):
        image = not path.name.startswith(("llada_", "dream_"))
        if image and METHODS[adapter].family == "prompt":
            continue
        argv = ["--config", str(path), "--adapter", adapter]
        argv += ["--instance_data_dir", "dog", "--instance_prompt", "a sks dog"] if image else []
        args: Any = parse_arguments(DreamBoothArguments if image else Arguments, argv)
        config: Any = adapter_config(args, total_steps=100)
        assert (config is None) == (adapter == "full")
        if METHODS[adapter].family in ("nara", "lora"):
            assert config.r == args.rank * (args.core_bins if adapter == "multi_lora" else 1)
            assert config.lora_dropout == args.lora_dropout


SCRIPTS = {"dllm": (Arguments, dllm.shipped_run), "dreambooth": (DreamBoothArguments, dreambooth_sdxl.shipped_run)}


@pytest.mark.parametrize("script", SCRIPTS)
@pytest.mark.parametrize("adapter", ["lora", "full", "tlora", "multi_lora", "nara_c", "nara_knots", "nara"])
def test_a_learning_rate_of_a_core_that_there_is_none_of_is_named(adapter: str, script: str, caplog) -> None:
    """What only the shipped run sets is nobody's mistake."""
    cls, shipped_run = SCRIPTS[script]
    args = parse_arguments(cls, ["--adapter", adapter], stand_in=shipped_run)
    assert caplog.messages == []
    has_core = adapter.startswith("nara")
    assert args.core_learning_rate == (1e-3 if has_core else None)
    parse_arguments(cls, ["--adapter", adapter, "--core_learning_rate", "1e-2"], stand_in=shipped_run)
    assert caplog.messages == ([] if has_core else [f"adapter {adapter} doesn't read core_learning_rate"])
