"""Values that a field of an adapter's configuration may have in a damaged file, and the few that are right for some;
which fields a file may lack."""

from __future__ import annotations

from typing import Any

WRONG: dict[str, Any] = {
    "a text": "x(",
    "a number as a text": "8",
    "null": None,
    "negative": -3,
    "zero": 0,
    "a fraction": 2.5,
    "NaN": float("nan"),
    "infinity": float("inf"),
    "overflowing": 10**12,
    "beyond float32": 1e39,
    "beyond floats": 10**400,
    "true": True,
    "a list": [1, -1],
    "a list of lists": [["q"]],
    "a bad pattern in a list": ["a)("],
    "a dictionary": {"x(": "y"},
    "a dictionary of zeros": {"first": 0},
}

MAY_BE: dict[str, set[str]] = {
    name: set(kinds.split(", "))
    for names, kinds in {
        "r mask_density_radius core_bins core_knots qalora_group_size": "",
        "noise_embedding_dim": "",
        "lora_alpha": "negative, zero, a fraction",
        "lora_dropout": "zero",
        "core_scale fourier_scale": "a fraction",
        "core_hidden_dims core_type core_init core_input core_sharing bias": "",
        "noise_embedding lora_a_init": "",
        "use_rslora use_dora lora_bias fan_in_fan_out inference_mode init_lora_weights": "true",
        "target_modules": "null, a number as a text, a bad pattern in a list",
        "exclude_modules": "null, a bad pattern in a list, a number as a text",
        "modules_to_save": "null",
        "layers_pattern": "null",
        "layers_to_transform": "null, zero, overflowing, beyond floats",
        "rank_pattern": "null",
        "alpha_pattern": "null, a dictionary of zeros",
        "trainable_token_indices rank_mask_min task_type": "null",
        "base_model_name_or_path revision peft_version": "null, a text, a number as a text",
        "noise_convention megatron_core": "null, a text, a number as a text",
        "scheduler strength": "null",
        "auto_mapping": "null, a dictionary, a dictionary of zeros",
        "loftq_config": "null, a dictionary, a dictionary of zeros",  # PEFT drops it without init_lora_weights="loftq"
        "eva_config corda_config lora_ga_config": "null, a dictionary, a dictionary of zeros",  # and these likewise
        "megatron_config layer_replication alora_invocation_tokens arrow_config use_bdlora velora_config": "null",
        "monteclora_config kasa_config target_parameters": "null",
        "use_qalora ensure_weight_tying": "",
        "peft_type": "",
    }.items()
    for name in names.split()
}

ALWAYS_THERE = [
    *("core_type", "core_scale", "core_hidden_dims", "core_init", "core_input", "core_sharing"),
    *("noise_embedding", "noise_embedding_dim", "fourier_scale", "mask_density_radius"),
    *("r", "rank_pattern", "lora_alpha", "alpha_pattern", "use_rslora", "use_dora", "lora_bias", "bias"),
    "init_lora_weights",
]
"""What the package's first version (commit 0ebe572) wrote, as far as an adapter is computed by it."""

LATER = [
    *("core_bins", "core_knots", "lora_a_init", "rank_mask_min", "scheduler", "strength"),
]
"""What later versions have added: files without them hold adapters of the defaults."""
