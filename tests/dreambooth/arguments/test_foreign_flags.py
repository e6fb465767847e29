"""Flags that users bring along from diffusers' own script: taken with their meaning, or refused with what to do."""

from __future__ import annotations

from pathlib import Path

import pytest

from nara_diffusion.dreambooth.arguments import DreamBoothArguments
from nara_diffusion.dreambooth.arguments.foreign_flags import FOREIGN_FLAGS
from nara_diffusion.dreambooth.setup import count_validation_steps
from nara_diffusion.training.arguments.cli import build_parser, parse_arguments

NEEDED = ["--pretrained_model_name_or_path", "m", "--instance_data_dir", "d", "--instance_prompt", "a photo of sks dog"]

# what diffusers' train_dreambooth_lora_sdxl.py takes, in its 0.42
THEIRS = (
    "pretrained_model_name_or_path pretrained_vae_model_name_or_path revision variant dataset_name "
    "dataset_config_name instance_data_dir cache_dir image_column caption_column repeats class_data_dir "
    "instance_prompt class_prompt validation_prompt num_validation_images validation_epochs "
    "with_prior_preservation prior_loss_weight num_class_images output_dir "
    "output_kohya_format seed resolution center_crop random_flip train_text_encoder train_batch_size "
    "sample_batch_size num_train_epochs max_train_steps checkpointing_steps checkpoints_total_limit "
    "resume_from_checkpoint gradient_accumulation_steps gradient_checkpointing learning_rate text_encoder_lr "
    "scale_lr lr_scheduler snr_gamma lr_warmup_steps lr_num_cycles lr_power dataloader_num_workers optimizer "
    "use_8bit_adam adam_beta1 adam_beta2 prodigy_beta3 prodigy_decouple adam_weight_decay "
    "adam_weight_decay_text_encoder adam_epsilon prodigy_use_bias_correction prodigy_safeguard_warmup "
    "max_grad_norm push_to_hub hub_token hub_model_id logging_dir allow_tf32 report_to mixed_precision "
    "prior_generation_precision local_rank enable_xformers_memory_efficient_attention rank lora_dropout "
    "use_dora image_interpolation_mode"
)


def test_every_flag_of_theirs_is_known() -> None:
    ours = {name for action in build_parser(DreamBoothArguments)._actions for name in action.option_strings}
    assert {f"--{name}" for name in THEIRS.split()} <= ours
    assert set(FOREIGN_FLAGS) <= set(THEIRS.split())


@pytest.mark.parametrize("name", FOREIGN_FLAGS)
@pytest.mark.parametrize("value", [[], ["1"]])
def test_what_has_no_use_here_is_refused_with_what_to_do(name, value, capsys) -> None:
    with pytest.raises(SystemExit):
        parse_arguments(DreamBoothArguments, [*NEEDED, f"--{name}", *value])
    assert f"argument --{name}: isn't taken here: {FOREIGN_FLAGS[name]}" in capsys.readouterr().err


def test_a_file_that_holds_one_is_refused_alike(tmp_path: Path, capsys) -> None:
    file = tmp_path / "run.yaml"
    file.write_text("hub_token: hf_secret\n")
    with pytest.raises(SystemExit):
        parse_arguments(DreamBoothArguments, [*NEEDED, "--config", str(file)])
    said = capsys.readouterr().err
    assert "hub_token isn't taken here" in said
    assert "hf auth login" in said
    assert "hf_secret" not in said


def test_they_are_not_in_the_help() -> None:
    text = build_parser(DreamBoothArguments).format_help()
    assert not any(f"--{name}" in text for name in FOREIGN_FLAGS)


def test_a_validation_every_other_epoch_is_one_every_so_many_steps() -> None:
    args = parse_arguments(DreamBoothArguments, [*NEEDED, "--validation_epochs", "2"])
    count_validation_steps(args, images=15, global_batch=4)
    assert args.validation_steps == 8  # 30 samples in steps of 4
    untouched = parse_arguments(DreamBoothArguments, [*NEEDED, "--validation_steps", "7"])
    count_validation_steps(untouched, images=15, global_batch=4)
    assert untouched.validation_steps == 7


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--validation_epochs", "0"], "validation_epochs must be at least 1, or none, got 0"),
        (["--adam_weight_decay_text_encoder", "0.1"], "the text encoders aren't trained: add train_text_encoder"),
        (
            ["--train_text_encoder", "--adam_weight_decay_text_encoder", "-1"],
            "adam_weight_decay_text_encoder must be at least 0, or none, got -1.0",
        ),
    ],
)
def test_impossible_values_are_refused(flags, message, capsys) -> None:
    with pytest.raises(SystemExit):
        parse_arguments(DreamBoothArguments, [*NEEDED, *flags])
    assert message in capsys.readouterr().err
