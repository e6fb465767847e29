"""Whether λ can help an adapter, here: measured before training, in about a minute on a small model.

    nara-check stabilityai/stable-diffusion-xl-base-1.0 dog --prompt "a photo of sks dog" --learning_rate 1e-3
    nara-check GSAI-ML/LLaDA-8B-Base train.jsonl --max_length 256 --learning_rate 1e-3

MODEL is Stable Diffusion XL or a masked language model: a folder, or a repository on the Hub. DATA is a folder of
images, or a JSON or JSON Lines file with records of instruction and output.

What is measured:
    R² of λ         how well one token's input of an adapted layer tells the noise level, by ridge regression
    lost share      of the gradients' energy at B, what the first step of a static update can't use, since the gradients
                    of bins of λ differ
    conflict ratio  what bins pull against each other after a short fit of a static LoRA, over the gradients' energy
                    before it
The conflict ratio decides: λ is likely to pay, unlikely to pay, or it can't be said. docs/check.md explains all three.

A training that is set up already is checked by itself, with its own data, loss and targets, by --check:
    python train_scripts/dreambooth_sdxl.py … --check
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

from nara_diffusion.check.measurement import CheckSettings, CheckTask
from nara_diffusion.check.run import run_check
from nara_diffusion.check.sources import image_source, text_source
from nara_diffusion.training.cli import option, parse_arguments

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
PREDICTIONS = ("epsilon", "v_prediction", "flow_prediction")
FEWEST_SAMPLES = 80
_POSITIONAL = ("--model", "--data")
_OF_IMAGES = ("prompt", "resolution", "prediction_type")


@dataclass
class CheckArguments:
    """Model, data and adapter"""

    positional: ClassVar[str] = "MODEL DATA "

    model: str = option("", "The same as MODEL.")
    data: str = option("", "The same as DATA.")
    output_dir: str = option("outputs/check", "Folder for check.json and check.png, which are overwritten.")
    rank: int = option(4, "Inner size r of the LoRA.")
    target_modules: list[str] | None = option(
        None, "Layers to adapt; none means a UNet's attention, or all linear layers of a language model."
    )
    prompt: str | None = option(None, "What images without a caption show; none means 'a photo'.")
    resolution: int | None = option(None, "Side of the images; none means what the UNet was made for.", unit="pixels")
    prediction_type: str | None = option(
        None, "What the UNet shall learn to predict; none means what it does.", choices=PREDICTIONS
    )
    max_length: int = option(512, "Length of prompt and answer together.", unit="tokens")
    learning_rate: float = option(1e-2, "Of the fit of the static LoRA. 1e-2 suits small models, 1e-3 large ones.")
    samples: int = option(480, "Measured before the fit, and again after it.", unit="samples")
    steps: int = option(60, "Of the fit, of 20 samples each.", unit="steps")
    batch_size: int = option(20, "Samples of one forward; fewer take less memory.", unit="samples")
    dtype: str = option("float32", "Precision of the frozen weights.", choices=tuple(DTYPES))
    device: str | None = option(None, "Where it runs, such as cuda:1; none means cuda if there is one, or cpu.")
    seed: int = option(0, "Of A, noise levels, noise and order: the same seed measures the same.")

    def __post_init__(self) -> None:
        if not self.model or not self.data:
            raise ValueError("MODEL and DATA are needed: nara-check MODEL DATA; --help says what they are.")
        if not Path(self.data).exists():
            raise ValueError(f"DATA {self.data} isn't there: name a folder of images, or a file of records.")
        for name in ("rank", "max_length", "steps", "batch_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}, expected at least 1.")
        if self.samples < FEWEST_SAMPLES:
            raise ValueError(
                f"samples is {self.samples}, too few for all bins of λ: expected {FEWEST_SAMPLES} at least."
            )
        if self.learning_rate <= 0:
            raise ValueError(f"learning_rate is {self.learning_rate}, expected more than 0.")
        if self.seed < 0:
            raise ValueError(f"seed is {self.seed}, expected 0 or more.")
        given = [name for name in _OF_IMAGES if getattr(self, name) is not None]
        if given and Path(self.data).is_file():
            raise ValueError(f"{', '.join(given)}: only for images, but DATA {self.data} is a file: leave it out.")


def check(args: CheckArguments) -> str:
    """Measures and writes; returns what to show.

    Raises:
        ValueError: a model or data that can't be used; an output folder that can't be written; see `measure`.
    """
    folder = Path(args.output_dir)
    check_writable(folder)
    torch.manual_seed(args.seed)
    settings = CheckSettings(args.samples, args.steps, learning_rate=args.learning_rate)
    about: dict[str, Any] = {name: value for name, value in asdict(args).items() if name != "output_dir"}
    return run_check(build_task(args), settings, folder, about, progress=True)[1]


def build_task(args: CheckArguments) -> CheckTask:
    """By the kind of the data: a file holds records, a folder images."""
    device = torch.device(args.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    build = text_source if Path(args.data).is_file() else image_source
    return build(args, device, DTYPES[args.dtype])


def check_writable(folder: Path) -> None:
    """Makes the folder, and tries to write there: before the model loads.

    Raises:
        ValueError: it isn't possible.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise ValueError(f"--output_dir {folder} can't be written ({error.strerror}): name another folder.") from error


def named(argv: Sequence[str]) -> list[str]:
    """`MODEL DATA --flag …` as `--model MODEL --data DATA --flag …`.

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
