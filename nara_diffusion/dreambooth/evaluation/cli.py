"""Subject fidelity and prompt fidelity, measured over several training seeds.

Three seeds of one method, measured with the encoders of DreamBooth's paper:
    nara-metrics --generated out-seed-0/samples-after out-seed-1/samples-after out-seed-2/samples-after \\
        --reference dog_images --clip openai/clip-vit-base-patch32 --dino facebook/dino-vits16 --identifier sks \\
        --output results.json

What is measured:
    DINO image similarity   mean cosine between generated images and those of the subject: subject fidelity
    CLIP image similarity   the same by CLIP, which sees kinds of things rather than this very one
    CLIP text alignment     mean cosine between a generated image and its prompt: prompt fidelity
Each has a mean, a standard deviation and a 95 % interval (Student's t) over the folders of --generated. Intervals that
overlap leave it open which of two methods is the better one. Figures of different encoders can't be compared.

Where the prompts come from:
    a metadata.jsonl in each generated folder, {"file_name": "00.png", "text": "a photo of sks dog on a beach"} a line;
    or text files beside the images, 00.txt or 00.caption with the prompt of 00.png;
    or --prompts FILE with one prompt a line: with k images a prompt, the first k of them belong to the first line.
Without any of these the two similarities alone are measured.

Several subjects, as in DreamBooth's own 30: let --reference and every --generated folder hold a subfolder for each,
of the same names. Each is measured by itself; a seed's figure is the mean over its subjects.
"""

# ruff: noqa: RUF009 (option() is dataclasses.field() with metadata, not a shared default)
from __future__ import annotations

import logging
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from nara_diffusion.training.arguments.cli import build_parser, option, parse_arguments
from nara_diffusion.training.output.output_dir import write_json

from .encoders import Encoder
from .subject_fidelity import PromptSource, evaluate, table

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass
class MetricsArguments:
    """Images, encoders and output"""

    generated: list[str] = option([], "Folders of generated images, one for each training seed; required.")
    reference: str | None = option(None, "Folder of the subject's own images; required.")
    prompts: str | None = option(None, "File with one prompt a line; none reads them from beside the images.")
    caption_column: str | None = option(None, "Key of the prompts in metadata.jsonl; none means text.")
    identifier: list[str] | None = option(
        None, "Words to leave out of the prompts before CLIP reads them, such as sks, which it doesn't know."
    )
    clip: str | None = option(None, "CLIP: a folder, or a repository on the Hub.")
    dino: str | None = option(None, "DINO or DINOv2: a folder, or a repository on the Hub.")
    device: str | None = option(
        None, "Where the encoders run, such as cuda:1; none means cuda if there is one, or cpu."
    )
    dtype: str = option("float32", "Precision of the encoders.", choices=tuple(DTYPES))
    batch_size: int = option(32, "Images that an encoder sees at once.", unit="images")
    output: str | None = option(None, "File for all figures as JSON; none shows the table alone.")

    def __post_init__(self) -> None:
        if not self.generated:
            raise ValueError("--generated is missing: name a folder of generated images for each training seed.")
        if self.reference is None:
            raise ValueError("--reference is missing: name the folder of the subject's own images.")
        if self.clip is None and self.dino is None:
            raise ValueError("--clip and --dino are missing: name at least one model to measure with.")
        if self.prompts is not None and self.clip is None:
            raise ValueError("--prompts are for text alignment, which needs --clip too.")
        if self.output is not None and Path(self.output).is_dir():
            raise ValueError(f"--output {self.output} is a folder: name a file, such as results.json.")


def measure(args: MetricsArguments) -> dict[str, Any]:
    """The figures, written to `args.output` too.

    Raises:
        ValueError: as `Encoder` and `evaluate`; or the output can't be written.
    """
    if args.output is not None:
        check_writable(Path(args.output))
    options: dict[str, Any] = {"device": args.device, "dtype": DTYPES[args.dtype], "batch_size": args.batch_size}
    figures = evaluate(
        args.generated,
        str(args.reference),
        clip=None if args.clip is None else Encoder(args.clip, **options),
        dino=None if args.dino is None else Encoder(args.dino, **options),
        prompts=PromptSource(
            None if args.prompts is None else Path(args.prompts), args.caption_column, args.identifier or ()
        ),
    )
    if args.output is not None:
        write_json(Path(args.output), {**figures, "arguments": asdict(args)})
    return figures


def check_writable(path: Path) -> None:
    """Makes the folder of `path`; raises ValueError if nothing can be written there, before hours of encoding."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path.parent):
            pass
    except OSError as error:
        raise ValueError(f"--output {path} can't be written ({error}): name a file in a folder of yours.") from error


def main(argv: Sequence[str] | None = None) -> None:
    """The command `nara-metrics`."""
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    logging.getLogger("httpx").setLevel(logging.WARNING)  # else a line for each file on the Hub
    args = parse_arguments(MetricsArguments, argv, description=__doc__)
    try:
        figures = measure(args)
    except (ValueError, OSError) as error:
        build_parser(MetricsArguments).error(str(error))
    sys.stdout.write(table(figures) + "\n")
    if args.output is not None:
        sys.stdout.write(f"all figures are in {args.output}\n")


if __name__ == "__main__":
    main()
