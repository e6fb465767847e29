"""Flags of other train scripts, and of earlier versions, with what they are called here.

An unknown flag that stands here is answered with its counterpart.
"""

FORMER_DICTS = (
    "model_options",
    "data_options",
    "objective_options",
    "distillation_options",
    "evaluation_options",
)
"""Version 0.2 had flags that took options as NAME=VALUE. Each of their options is a flag now."""

COUNTERPARTS = {
    "--pretrained_model_name_or_path": "model_name_or_path base_model",
    "--pretrained_vae_model_name_or_path": "vae",
    "--train_file": "data_path train_data",
    "--instance_data_dir": "train_data_dir image_dir folder_path",
    "--class_data_dir and --class_prompt": "with_prior_preservation reg_data_dir is_reg",
    "--instance_prompt": "class_tokens",
    "--source_data_dir": "control_directory control_path",
    "--repeats": "num_repeats",
    "--trigger": "trigger_word",
    "--caption_column": "image_caption_column",
    "the folder mask, with --mask_floor": "conditioning_data_dir mask_path masked_loss masked_training "
    "unmasked_weight mask_min_value",
    "--caption_dropout": "caption_dropout_rate proportion_empty_prompts",
    "--aspect_ratio_buckets auto": "enable_bucket",
    "--random_flip": "flip_aug",
    "--max_length": "max_seq_length cutoff_len",
    "--rank": "network_dim lora_rank lora_r",
    "--lora_alpha": "network_alpha",
    "--lora_dropout": "network_dropout",
    "--target_modules": "lora_layers lora_target_modules",
    "--init_adapter": "network_weights",
    "--adapter nara_dora or --adapter dora": "use_dora",
    "--adapter_options": "network_args",
    "--train_batch_size": "batch_size per_device_train_batch_size",
    "--max_train_steps": "steps max_steps",
    "--num_train_epochs": "epochs max_train_epochs",
    "--learning_rate": "lr unet_lr",
    "--lr_warmup_steps": "warmup_steps warmup_ratio",
    "--optimizer": "optimizer_type",
    "--optimizer AdamW8bit": "use_8bit_adam",
    "--optimizer_options": "optimizer_args prodigy_beta3 prodigy_decouple",
    "--optimizer_options betas=[0.9,0.999] eps=1e-8": "adam_beta1 adam_beta2 adam_epsilon",
    "--weight_decay": "adam_weight_decay",
    "--mixed_precision": "bf16 fp16",
    "--load_in_4bit or --load_in_8bit": "quantization quantize base_model_precision fp8_base",
    "--block_swap": "blocks_to_swap",
    "--plan 16, in GB": "fit",
    "--snr_gamma": "min_snr_gamma",
    "--flow_shift": "discrete_flow_shift",
    "--min_noise_level and --max_noise_level": "min_timestep max_timestep",
    "--validation_prompts": "validation_prompt sample_prompts",
    "--validation_steps": "validation_epochs eval_steps sample_every_n_steps",
    "--checkpointing_steps": "save_steps save_every_n_steps",
    "--checkpoints_total_limit": "save_total_limit",
    "--output_dir": "output_name",
    "--resume_from_checkpoint": "resume",
    "--hub_model_id": "push_to_hub",
    "the environment variable HF_HOME": "cache_dir",
    "a flag for each of its options": " ".join(FORMER_DICTS),
}
"""{what to use here: flags of other scripts}. A hint is given only by scripts that have its flags."""

OTHERS = {name: here for here, names in COUNTERPARTS.items() for name in names.split()}
"""{flag of another script: what to use here}."""
