"""Flags of other trainers: each one that is known leads to an argument of a script."""

import pytest

from nara_diffusion.dreambooth.arguments import DreamBoothArguments
from nara_diffusion.training.arguments.cli import parse_arguments
from nara_diffusion.training.arguments.foreign_names import OTHER_NAMES
from train_scripts.dllm import Arguments


@pytest.mark.parametrize("name", OTHER_NAMES)
def test_other_name_is_no_flag_and_leads_to_one(capsys, name: str) -> None:
    errors = []
    for arguments in (DreamBoothArguments, Arguments):
        with pytest.raises(SystemExit):
            parse_arguments(arguments, [f"--{name}", "1"])
        errors.append(capsys.readouterr().err)
    assert any(f"unrecognized arguments: --{name} 1. Did you mean --{OTHER_NAMES[name]}?" in text for text in errors)


@pytest.mark.parametrize(
    ("words", "field", "value"),
    [("--prodigy_use_bias_correction False --prodigy_safeguard_warmup=True", "prodigy_use_bias_correction", False)],
)
def test_flags_that_diffusers_declares_with_type_bool(words: str, field: str, value: bool) -> None:
    args = parse_arguments(
        DreamBoothArguments,
        [*words.split(), "--pretrained_model_name_or_path=x", "--instance_data_dir=x", "--instance_prompt=sks dog"],
    )
    assert getattr(args, field) is value
    assert args.prodigy_safeguard_warmup is True
