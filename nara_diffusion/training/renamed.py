"""Flags and keys of version 0.1 that have gone or moved, and what to do now. It serves one release."""

from __future__ import annotations

_ADAPTER = "use_rslora num_virtual_tokens core_hidden_dims core_init core_input core_sharing lora_a_init rank_mask_min"
_ADAPTER += " core_bins core_knots noise_embedding noise_embedding_dim fourier_scale mask_density_radius"
_WITHIN = {
    "adapter_options": _ADAPTER,
    "optimizer_options": "prodigy_beta3 prodigy_decouple prodigy_use_bias_correction prodigy_safeguard_warmup",
    "model_options": "mask_token ignore_tensors revision variant max_sequence_length clip_skip training_guidance_scale",
    "data_options": "dataset_config_name instruction_field input_field output_field answer_field image_column "
    "caption_column crops_per_image cache_latents",
    "objective_options": "rescale_betas_zero_snr noise_offset do_edm_style_training loss_type huber_c logit_mean "
    "logit_std mode_scale flow_shift",
    "evaluation_options": "temperature cfg_scale remasking curve_points sample_batch_size",
}
_GONE = "has gone"

RENAMED: dict[str, str] = {
    **{
        name: f"give --{where} {name.removeprefix('prodigy_')}=VALUE."
        for where, names in _WITHIN.items()
        for name in names.split()
    },
    "use_dora": "give --adapter nara_dora or dora, or --adapter_options use_dora=true.",
    "adam_beta1": "give --optimizer_options betas=[0.9,0.999].",
    "adam_beta2": "give --optimizer_options betas=[0.9,0.999].",
    "adam_epsilon": "give --optimizer_options eps=1e-8.",
    "adam_weight_decay": "give --weight_decay.",
    "adam_weight_decay_text_encoder": f"{_GONE}; --weight_decay is for the text encoders too.",
    "use_8bit_adam": "give --optimizer AdamW8bit.",
    "lr_num_cycles": f"{_GONE}, as has cosine_with_restarts: give --lr_scheduler cosine.",
    "lr_power": f"{_GONE}, as has polynomial: give --lr_scheduler linear.",
    "scale_lr": f"{_GONE}: give the product as --learning_rate.",
    "allow_tf32": f"{_GONE}: set TORCH_ALLOW_TF32_CUBLAS_OVERRIDE=1, or give --mixed_precision bf16.",
    "dataloader_num_workers": f"{_GONE}: batches are made of tokens and latents that are there.",
    "logging_dir": f"{_GONE}: trackers write to the output folder.",
    "push_to_hub": "give --hub_model_id alone, the repository to upload to.",
    "hold_base_outside": f"{_GONE}: --min_noise_level and --max_noise_level switch the adapter off outside.",
    "hold_base_share": f"{_GONE}, with --hold_base_outside.",
    "timestep_bias_strategy": f"{_GONE}: give --min_noise_level, --max_noise_level, or --weighting_scheme of a flow.",
    "timestep_bias_multiplier": f"{_GONE}, with --timestep_bias_strategy.",
    "timestep_bias_portion": f"{_GONE}, with --timestep_bias_strategy.",
    "timestep_bias_begin": f"{_GONE}, with --timestep_bias_strategy.",
    "timestep_bias_end": f"{_GONE}, with --timestep_bias_strategy.",
    "shuffle_caption": f"{_GONE}: --caption_dropout alone changes captions.",
    "keep_tokens": f"{_GONE}, with --shuffle_caption.",
    "repeats": f"{_GONE}: give --num_train_epochs or --max_train_steps.",
    "caption_source": f"{_GONE}: captions are those of metadata.jsonl or of .txt files where there are some.",
    "cache_memory": f"{_GONE}: a cache holds 1 GiB.",
    "prior_generation_precision": f"{_GONE}: class images are generated in --mixed_precision.",
    "with_prior_preservation": "give --class_data_dir and --class_prompt alone.",
    "upcast_vae": f"{_GONE}: images are always encoded in float32.",
    "cache_dir": f"{_GONE}: set the environment variable HF_HOME.",
    "validation_epochs": "give --validation_steps.",
    "validation_prompt": "give --validation_prompts.",
    "ema_decay": f"{_GONE}: --use_ema averages with Diffusers' decay.",
}
"""{name: what to do now}."""
