"""Teach an image model a subject from a few images. The code is in nara_diffusion/dreambooth/train.py.

The shipped model (a small rectified flow with SD3's classes) and images, offline, on CPU, in minutes:
    accelerate launch train_scripts/dreambooth.py
Your own five images, on one GPU:
    accelerate launch train_scripts/dreambooth.py --pretrained_model_name_or_path MODEL --mixed_precision bf16 \\
        --instance_data_dir dog --instance_prompt "a photo of sks dog" --output_dir sks-dog
"""

import sys

from nara_command import IMAGE_FLAGS, refuse_typos

if __name__ == "__main__":
    refuse_typos(sys.argv[1:], IMAGE_FLAGS)  # before the imports that take seconds

from nara_diffusion.dreambooth.train import DreamBoothArguments, __doc__, main, shipped_run
from nara_diffusion.training.command import run_command

if __name__ == "__main__":
    run_command(main, DreamBoothArguments, __doc__, shipped_run)
