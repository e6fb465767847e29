"""Flags of diffusers' own script that this one has no use for: what to do instead."""

FOREIGN_FLAGS = {
    "enable_xformers_memory_efficient_attention": (
        "PyTorch's own attention is used, which takes as little memory as xFormers': leave it out."
    ),
    "hub_token": (
        "a token on the command line is seen by all users of the machine and kept in config.yaml: run `hf auth login` "
        "once, or set the environment variable HF_TOKEN."
    ),
    "image_interpolation_mode": "images are scaled with Lanczos' filter, that script's default too: leave it out.",
    "local_rank": "accelerate tells each process its rank: leave it out, and use `accelerate launch --multi_gpu`.",
    "output_kohya_format": (
        "Kohya's format has no place for a core, so a NaRA can't be written in it. A plain LoRA can: train with "
        "--adapter lora, and convert the file by diffusers.utils.convert_state_dict_to_kohya."
    ),
}
