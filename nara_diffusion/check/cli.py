"""Whether an adapter that knows the noise level λ is likely to beat LoRA: about a minute on a small model.

    nara-check stabilityai/stable-diffusion-xl-base-1.0 dog --prompt "a photo of sks dog" --learning_rate 1e-3
    nara-check GSAI-ML/LLaDA-8B-Base train.jsonl --max_length 256 --learning_rate 1e-3

MODEL is an image model that train_scripts/dreambooth.py can train, or a masked-diffusion language model: a folder, or a
repository on the Hub. DATA is a folder of images, or a JSON or JSON Lines file with records of instruction and output.

It repeats short trainings of LoRA, of NaRA, and of NaRA that is told the same λ for every sample, from the same start
on the same samples, noise levels and noise. The verdict rests on the relative differences of their losses on held-out
samples, with 95 % intervals: λ is likely to pay, λ is unlikely to pay, or can't say. docs/check.md explains it.

To check a training with its own data, loss and targets, add --check to its command:
    python train_scripts/dreambooth.py … --check
"""

# ruff: noqa: RUF009 (option() is dataclasses.field() with metadata, not a shared default)
from __future__ import annotations

import logging
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import takewhile
from pathlib import Path
from typing import Any, ClassVar

import torch

from nara_diffusion.dreambooth.conversion import CONVERSIONS
from nara_diffusion.training.parser import option, parse_arguments
from nara_diffusion.utils.devices import usable_device

from .sources import image_source, text_source
from .trials import CheckSettings, CheckTask
from .verdict import THRESHOLDS
from .verdict_report import run_check

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
FEWEST_SAMPLES = 20
_POSITIONAL = ("--model", "--data")
_OF_IMAGES = ("prompt", "resolution", "prediction_type")


@dataclass
class CheckArguments:
    """Model, data and adapter"""

    positional: ClassVar[str] = "MODEL DATA "

    model: str = option("", "The same as MODEL.")
    data: str = option("", "The same as DATA.")
    output_dir: str = option("outputs/check", "Folder for check.json and check.png, which are overwritten.")
    rank: int = option(4, "Rank r of the adapters.")
    target_modules: list[str] | None = option(
        None, "Modules to adapt; none means the denoiser's attention, or all linear layers of a language model."
    )
    prompt: str | None = option(None, "Prompt of the images that have no caption; none means 'a photo'.")
    resolution: int | None = option(None, "Side of the images; none means that of the model.", unit="pixels")
    prediction_type: str | None = option(
        None, "What the denoiser is trained to predict; none means what it predicts now.", choices=CONVERSIONS
    )
    max_length: int = option(512, "Largest length of prompt and answer together.", unit="tokens")
    learning_rate: float = option(1e-2, "Learning rate of A and B. 1e-2 suits small models, 1e-3 large ones.")
    core_learning_rate: float | None = option(
        None, "Learning rate of NaRA's core; none means a quarter of --learning_rate."
    )
    steps: int = option(100, "Length of each short training.", unit="optimizer steps")
    batch_size: int = option(5, "Samples of an optimizer step, and of a forward.", unit="samples")
    samples: int = option(100, "Held-out samples of each repeat, at least 20.", unit="samples")
    repeats: int = option(6, "Largest number of repeats, at least 3; it stops as soon as the verdict is clear.")
    dtype: str = option("float32", "Precision of the frozen weights.", choices=tuple(DTYPES))
    device: str | None = option(None, "Device, such as cuda:1; none means cuda if there is one, or else cpu.")
    seed: int = option(0, "Seed of A, core, noise levels, noise and order of the samples.")

    def __post_init__(self) -> None:
        if not self.model or not self.data:
            raise ValueError("MODEL and DATA are needed: nara-check MODEL DATA; see --help.")
        if not Path(self.data).exists():
            raise ValueError(f"DATA {self.data} doesn't exist: name a folder of images, or a file of records.")
        fewest = {"rank": 1, "max_length": 1, "steps": 1, "batch_size": 1}
        fewest |= {} if self.resolution is None else {"resolution": 1}
        for name, least in (fewest | {"samples": FEWEST_SAMPLES, "repeats": THRESHOLDS.fewest}).items():
            if getattr(self, name) < least:
                raise ValueError(f"{name} is {getattr(self, name)}, expected at least {least}.")
        for name in ("learning_rate", "core_learning_rate"):
            if (value := getattr(self, name)) is not None and value <= 0:
                raise ValueError(f"{name} is {value}, expected more than 0.")
        if self.seed < 0:
            raise ValueError(f"seed is {self.seed}, expected 0 or more.")
        given = [name for name in _OF_IMAGES if getattr(self, name) is not None]
        if given and Path(self.data).is_file():
            raise ValueError(f"{', '.join(given)}: only for images, but DATA {self.data} is a file; leave it out.")


def check(args: CheckArguments) -> str:
    """Run a check, write its report, and return the text to show.

    Raises:
        ValueError: the model, the data or the device can't be used; the output folder can't be written; `run_check`.
    """
    folder = Path(args.output_dir)
    check_writable(folder)
    settings = CheckSettings(args.steps, args.samples, args.repeats)
    about: dict[str, Any] = {name: value for name, value in asdict(args).items() if name != "output_dir"}
    return run_check(build_task(args), settings, folder, about, progress=True)[1]


def build_task(args: CheckArguments) -> CheckTask:
    """The task of the data: a file holds records, a folder images.

    Raises:
        ValueError: PyTorch has no such device; see `text_source` and `image_source`.
    """
    device = usable_device(args.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    build = text_source if Path(args.data).is_file() else image_source
    return build(args, device, DTYPES[args.dtype])


def check_writable(folder: Path) -> None:
    """Create the folder and write to it for a test, before the model is loaded.

    Raises:
        ValueError: that fails.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise ValueError(f"--output_dir {folder} can't be written ({error.strerror}): name another folder.") from error


def named(argv: Sequence[str]) -> list[str]:
    """Turn the words `MODEL DATA --flag …` into `--model MODEL --data DATA --flag …`.

    Raises:
        ValueError: more than two words before the first flag.
    """
    words = list(takewhile(lambda word: not word.startswith("-"), argv))
    if len(words) > len(_POSITIONAL):
        raise ValueError(f"nara-check takes MODEL and DATA before its flags, got {len(words)}: {' '.join(words)}.")
    flags = [part for pair in zip(_POSITIONAL, words, strict=False) for part in pair]
    return [*flags, *argv[len(words) :]]


def main(argv: Sequence[str] | None = None) -> None:
    """The command `nara-check`."""
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    try:
        words = named(sys.argv[1:] if argv is None else argv)
        sys.stdout.write(check(parse_arguments(CheckArguments, words, description=__doc__)) + "\n")
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
