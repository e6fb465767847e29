"""Teach Stable Diffusion XL a subject from a few images, and measure the result.

The adapter is a NaRA or another adapter. This script is train_scripts/dreambooth.py with SDXL's defaults, and with a
different shipped model and images.

The shipped model and images, offline, on CPU, in minutes:
    accelerate launch train_scripts/dreambooth_sdxl.py
Your own five images, on one GPU, with the settings of a file for SDXL (flags win over the file):
    accelerate launch train_scripts/dreambooth_sdxl.py --config train_scripts/configs/sdxl_dreambooth.yaml \\
        --instance_data_dir dog --instance_prompt "a photo of sks dog" --output_dir sks-dog

The small shipped SDXL has its own settings instead of the defaults below. The log lists them.
The output folder contains the weights (for pipe.load_nara_weights), README.md (the model card, which says how to load
them), samples.png, config.yaml, results.json, metrics.jsonl, noise_level_curve.png, and checkpoint-N folders to resume
from.
"""

from functools import partial

from nara_flags.images import ImageFlags
from nara_flags.imports import lasting_imports
from nara_flags.parser import read_flags

if __name__ == "__main__":
    flags = read_flags(ImageFlags, about=__doc__)

    # these imports take seconds, so help and mistakes come first
    with lasting_imports():
        from nara_diffusion.dreambooth.image_arguments import CONFIGS, shipped_run
        from nara_diffusion.dreambooth.train import DreamBoothArguments, main
        from nara_diffusion.training.command import run_command

    shipped = partial(shipped_run, config=CONFIGS / "sdxl_tiny.yaml")
    run_command(main, DreamBoothArguments, flags, shipped)
