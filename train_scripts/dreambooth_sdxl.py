"""Teaches Stable Diffusion XL a subject from a few images, with NaRA or another adapter, and shows what that brought.

It is train_scripts/dreambooth.py with the defaults of SDXL, and with a model and images of its own.

The shipped model and images, offline, on CPU, in minutes:
    accelerate launch train_scripts/dreambooth_sdxl.py
Your own five images, on one GPU; the file holds what suits SDXL, flags win over it:
    accelerate launch train_scripts/dreambooth_sdxl.py --config train_scripts/configs/sdxl_dreambooth.yaml \\
        --instance_data_dir dog --instance_prompt "a photo of sks dog" --output_dir sks-dog

The small SDXL has settings of its own, not the defaults below: the log says them.
Written to the output folder: the weights (for pipe.load_nara_weights), README.md (the model card, which says how to
load them), samples.png, config.yaml, results.json, metrics.jsonl, noise_level_curve.png, checkpoint-N to resume from.
"""

import sys
from functools import partial

from nara_command import IMAGE_FLAGS, refuse_typos

if __name__ == "__main__":
    refuse_typos(sys.argv[1:], IMAGE_FLAGS)  # before the imports that take seconds

from nara_diffusion.dreambooth.pipelines import CONFIGS, shipped_run
from nara_diffusion.dreambooth.train import DreamBoothArguments, main
from nara_diffusion.training.command import run_command

if __name__ == "__main__":
    run_command(
        main, DreamBoothArguments, __doc__, partial(shipped_run, config=CONFIGS / "sdxl_tiny.yaml")
    )
