"""Teach an image model a subject from a few images. The code is in nara_diffusion/dreambooth/train.py.

The shipped model (a small rectified flow with SD3's classes) and images, offline, on CPU, in minutes:
    accelerate launch train_scripts/dreambooth.py
Your own five images, on one GPU:
    accelerate launch train_scripts/dreambooth.py --pretrained_model_name_or_path MODEL --mixed_precision bf16 \\
        --instance_data_dir dog --instance_prompt "a photo of sks dog" --output_dir sks-dog
"""

from nara_flags.images import ImageFlags
from nara_flags.imports import lasting_imports
from nara_flags.parser import read_flags

if __name__ == "__main__":
    flags = read_flags(ImageFlags)

    # these imports take seconds, so help and mistakes come first
    with lasting_imports():
        from nara_diffusion.dreambooth.train import DreamBoothArguments, main, shipped_run
        from nara_diffusion.training.command import run_command

    run_command(main, DreamBoothArguments, flags, shipped_run)
