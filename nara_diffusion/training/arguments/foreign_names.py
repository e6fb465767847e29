"""Names that other trainers use for our arguments, for the hint "did you mean …?" in errors.

A value that follows the name is part of the answer. Where a script lacks the argument, nothing is suggested.
"""

from __future__ import annotations

_KOHYA = {
    "cache_latents_to_disk": "cache_folder",
    "caption_dropout_rate": "caption_dropout",
    "caption_extension": "caption_source text_files",
    "dataset_repeats": "repeats",
    "enable_bucket": "aspect_ratio_buckets auto",
    "flip_aug": "random_flip",
    "huggingface_repo_id": "hub_model_id",
    "log_with": "report_to",
    "lr_scheduler_num_cycles": "lr_num_cycles",
    "lr_scheduler_power": "lr_power",
    "max_data_loader_n_workers": "dataloader_num_workers",
    "max_timestep": "max_noise_level",
    "max_train_epochs": "num_train_epochs",
    "min_snr_gamma": "snr_gamma",
    "min_timestep": "min_noise_level",
    "network_alpha": "lora_alpha",
    "network_args": "adapter_options",
    "network_dim": "rank",
    "network_dropout": "lora_dropout",
    "network_module": "adapter",
    "optimizer_type": "optimizer",
    "output_name": "output_dir",
    "reg_data_dir": "class_data_dir",
    "resume": "resume_from_checkpoint",
    "sample_every_n_epochs": "validation_epochs",
    "sample_every_n_steps": "validation_steps",
    "sample_prompts": "validation_prompts",
    "save_every_n_steps": "checkpointing_steps",
    "save_last_n_steps": "checkpoints_total_limit",
    "train_data_dir": "instance_data_dir",
    "unet_lr": "learning_rate",
    "vae": "pretrained_vae_model_name_or_path",
}
_DIFFUSERS = {
    "proportion_empty_prompts": "caption_dropout",
    "lora_layers": "target_modules",  # of the scripts for Flux and SD3
    "max_sequence_length": "max_length",
}
_TRANSFORMERS_AND_PEFT = {
    "base_model": "pretrained_model_name_or_path",
    "batch_size": "global_batch_size",
    "bf16": "mixed_precision bf16",
    "cutoff_len": "max_length",
    "data_path": "train_file",
    "eval_steps": "validation_steps",
    "fp16": "mixed_precision fp16",
    "lora_r": "rank",
    "lora_target_modules": "target_modules",
    "lr_scheduler_type": "lr_scheduler",
    "max_seq_length": "max_length",
    "max_steps": "max_train_steps",
    "micro_batch_size": "train_batch_size",
    "model_name_or_path": "pretrained_model_name_or_path",
    "optim": "optimizer",
    "per_device_eval_batch_size": "eval_batch_size",
    "per_device_train_batch_size": "train_batch_size",
    "r": "rank",
    "save_steps": "checkpointing_steps",
    "save_total_limit": "checkpoints_total_limit",
    "tf32": "allow_tf32",
    "val_set_size": "validation_samples",
    "warmup_ratio": "lr_warmup_steps",
    "warmup_steps": "lr_warmup_steps",
}
OTHER_NAMES = _KOHYA | _DIFFUSERS | _TRANSFORMERS_AND_PEFT
