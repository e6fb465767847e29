"""The DreamBooth script's arguments: those of the shipped run, of Diffusers' own script, and of the file for SDXL."""

import sys
from dataclasses import fields
from pathlib import Path

from nara_diffusion.dreambooth.arguments import DreamBoothArguments
from nara_diffusion.training.arguments.cli import build_parser, parse_arguments
from train_scripts.dreambooth import SHIPPED_DATA
from train_scripts.dreambooth_sdxl import SHIPPED_RUN, shipped_run


def test_without_arguments_the_shipped_model_and_subject_are_used() -> None:
    args = parse_arguments(DreamBoothArguments, [], stand_in=shipped_run)
    assert {name: getattr(args, name) for name in SHIPPED_RUN | SHIPPED_DATA} == SHIPPED_RUN | SHIPPED_DATA
    assert args.output_dir is None
    argv = ["--instance_data_dir", "photos", "--instance_prompt", "a photo of sks cat"]
    own = parse_arguments(DreamBoothArguments, argv, stand_in=shipped_run)
    assert (own.pretrained_model_name_or_path, own.validation_prompts, own.prompts) == (
        SHIPPED_RUN["pretrained_model_name_or_path"], None, ["a photo of sks cat"],
    )  # fmt: skip
    named = parse_arguments(DreamBoothArguments, ["--pretrained_model_name_or_path", "x", *argv], stand_in=shipped_run)
    assert (named.resolution, named.max_train_steps) == (1024, None)


def test_the_command_line_of_diffusers_own_script_is_understood() -> None:
    """As its documentation has it, with what else it offers; `--report_to` takes several."""
    words = """--pretrained_model_name_or_path=stabilityai/stable-diffusion-xl-base-1.0 --instance_data_dir=dog
        --pretrained_vae_model_name_or_path=madebyollin/sdxl-vae-fp16-fix --output_dir=lora-trained-xl
        --mixed_precision=fp16 --resolution=1024 --train_batch_size=1 --gradient_accumulation_steps=4
        --learning_rate=1e-4 --report_to=wandb --lr_scheduler=constant --lr_warmup_steps=0 --max_train_steps=500
        --seed=0 --push_to_hub --use_8bit_adam --train_text_encoder --text_encoder_lr=5e-6 --with_prior_preservation
        --class_data_dir=dogs --num_class_images=200 --prior_loss_weight=0.5 --snr_gamma=5.0 --center_crop --random_flip
        --gradient_checkpointing --rank=16 --use_dora --adam_weight_decay=1e-2 --adam_beta1=0.8
        --checkpointing_steps=250 --checkpoints_total_limit=3 --num_validation_images=2 --sample_batch_size=2
        --dataloader_num_workers=2 --variant=fp16 --revision=main --repeats=2 --lr_num_cycles=2 --lr_power=2 --scale_lr
        --allow_tf32 --max_grad_norm=0.5 --hub_model_id=me/dog --prior_generation_precision=bf16 --cache_dir=cache
        --resume_from_checkpoint=latest --image_column=picture --caption_column=words"""
    argv = [
        *words.split(),
        "--instance_prompt=a photo of sks dog",
        "--class_prompt=a photo of a dog",
        "--validation_prompt=A photo of sks dog, in a bucket",
    ]
    args = parse_arguments(DreamBoothArguments, argv)
    assert args.validation_prompts == ["A photo of sks dog, in a bucket"]
    assert (args.weight_decay, args.text_encoder_lr, args.report_to, args.use_dora) == (0.01, 5e-6, ["wandb"], True)


def test_help_lists_every_flag_once(monkeypatch) -> None:
    monkeypatch.setattr(sys, "argv", ["dreambooth_sdxl.py"])
    text = build_parser(DreamBoothArguments).format_help()
    for field in fields(DreamBoothArguments):
        assert text.count(f"\n  --{field.name}") >= 1, field.name
    assert text.count("\nAdapter:") == 1
    assert "(default: to_q,to_k,to_v,to_out.0)" in text


def test_the_configuration_for_sdxl() -> None:
    path = Path(__file__).parents[3] / "train_scripts" / "configs" / "sdxl_dreambooth.yaml"
    argv = ["--config", str(path), "--instance_data_dir", "dog", "--instance_prompt", "a photo of sks dog"]
    args = parse_arguments(DreamBoothArguments, argv)
    assert args.pretrained_model_name_or_path == "stabilityai/stable-diffusion-xl-base-1.0"
    assert (args.resolution, args.rank, args.max_train_steps, args.learning_rate) == (1024, 16, 500, 1e-4)
    assert (args.core_scale, args.core_hidden_dims, args.noise_embedding) == (0.1, [256, 512], "fourier")
