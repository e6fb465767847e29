"""Flags and keys of version 0.1 that have gone or moved, and what to do now. It serves one release."""

from __future__ import annotations

_ADAPTER = "use_rslora num_virtual_tokens core_hidden_dims core_init core_input core_sharing lora_a_init rank_mask_min"
_ADAPTER += " core_bins core_knots noise_embedding noise_embedding_dim fourier_scale mask_density_radius"
_PRODIGY = "beta3 decouple use_bias_correction safeguard_warmup"
_GONE = "has gone"

RENAMED: dict[str, str] = {
    **{name: f"give --adapter_options {name}=VALUE." for name in _ADAPTER.split()},
    **{f"prodigy_{name}": f"give --optimizer_options {name}=VALUE." for name in _PRODIGY.split()},
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
    "do_edm_style_training": f"{_GONE}: the model's scheduler decides, and an EDM one is trained so.",
    "loss_type": f"{_GONE}: the error is squared.",
    "huber_c": f"{_GONE}, with --loss_type: the error is squared.",
    "clip_skip": f"{_GONE}: prompts are encoded as the model's pipeline does.",
    "ema_decay": f"{_GONE}: --use_ema averages with Diffusers' decay.",
}
"""{name: what to do now}. Those that are declared `within` another (see `option`) the parser knows by itself."""
