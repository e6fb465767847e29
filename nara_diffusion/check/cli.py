"""Whether an adapter that knows the noise level λ is likely to beat LoRA, before a training: minutes on a small model.

    nara-check stabilityai/stable-diffusion-xl-base-1.0 dog --instance_prompt "a photo of sks dog" --learning_rate 1e-3
    nara-check GSAI-ML/LLaDA-8B-Base train.jsonl --max_length 256 --learning_rate 1e-3

MODEL is an image model that train_scripts/dreambooth.py can train, or a masked-diffusion language model: a folder, or a
repository on the Hub. DATA is a folder of images, or a JSON or JSON Lines file with records of instruction and output.
Further flags are those of that train script, whose --check this is, with defaults for short trainings of rank 4.

It repeats short trainings of LoRA, of NaRA, of NaRA that reads the same λ for every sample, and of a cheaper way of
telling λ; their held-out losses say whether λ is likely to pay, and by which way. docs/check.md explains it.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Mapping, Sequence
from importlib import import_module
from itertools import takewhile
from pathlib import Path
from typing import Any

from nara_diffusion.training.parser import parse_arguments

SHORT = {"rank": 4, "train_batch_size": 5, "learning_rate": 1e-2, "output_dir": "outputs/check", "check": True}


def main(argv: Sequence[str] | None = None) -> None:
    """The command `nara-check`."""
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    words = list(sys.argv[1:] if argv is None else argv)
    places = list(takewhile(lambda word: not word.startswith("-"), words))
    try:
        if {"-h", "--help"} & set(words) and not places:
            sys.stdout.write(f"{__doc__}\n")
        elif len(places) != 2:
            raise ValueError(f"nara-check takes MODEL and DATA before its flags, got {len(places)}; see --help.")
        else:
            check(places[0], places[1], words[2:])
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")


def check(model: str, data: str, flags: Sequence[str]) -> dict[str, Any]:
    """Run the check of the train script that `data` is for, and return what check.json holds."""
    own: dict[str, Any] = {**SHORT, "pretrained_model_name_or_path": model}
    if Path(data).is_file():
        script: Any = import_module("nara_diffusion.dllm.train")
        arguments, own = script.Arguments, own | {"train_file": data, "target_modules": ["all-linear"]}
    elif Path(data).is_dir():
        from nara_diffusion.dreambooth.shipped import family_defaults

        script = import_module("nara_diffusion.dreambooth.train")
        arguments = script.DreamBoothArguments
        own = {"instance_data_dir": data, "instance_prompt": "a photo", **family_defaults(own), **own}
    else:
        raise ValueError(f"DATA {data} doesn't exist: name a folder of images, or a file of records.")

    def defaults(given: Mapping[str, Any]) -> dict[str, Any]:
        return own | {"core_learning_rate": given.get("learning_rate", own["learning_rate"]) / 4}

    return script.main(parse_arguments(arguments, flags, description=__doc__, defaults=defaults))
