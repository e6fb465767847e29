"""Conversion of a NaRA between its two file formats, tensor by tensor, without the base model.

    nara convert my-toy folder --to peft                            # from save_nara_weights to PeftModel
    nara convert my-toy folder --to peft --component text_encoder   # the same, one of several components
    nara convert folder my-toy --to pipeline --component unet       # from PEFT to pipe.load_nara_weights

To plain LoRAs: nara fold. From a LoRA to a NaRA: nara_diffusion.from_lora, or --init_adapter of the train scripts.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from nara_diffusion.loaders.file import WEIGHTS_NAME, AdapterPart
from nara_diffusion.loaders.file import AdapterFile as File
from nara_diffusion.loaders.insertion import check_storable

from .adapter_file import MODEL, read
from .errors import in_one_line
from .skeleton import skeleton

FORMS = ("peft", "pipeline")


def chosen(parts: Mapping[str, AdapterPart], component: str | None) -> AdapterPart:
    """The part of `component`, or, if it is None, the only part.

    Raises:
        ValueError: there is no such component, or there are several and `component` is None.
    """
    if component is None and len(parts) == 1:
        return next(iter(parts.values()))
    if component is None:
        raise ValueError(f"the file has {', '.join(parts)}: choose one by --component.")
    if component not in parts:
        raise ValueError(f"--component is {component!r}, and the file has {', '.join(parts)}: choose one of these.")
    return parts[component]


def to_peft(part: AdapterPart, folder: Path) -> None:
    """Write adapter_config.json and adapter_model.safetensors, both or none."""
    File({MODEL: part}).save_peft(folder)


def to_pipeline(part: AdapterPart, component: str, folder: Path) -> None:
    """Write the file of `save_nara_weights` for `component` of a pipeline, whole or not at all."""
    folder.mkdir(parents=True, exist_ok=True)
    File({component: part}).save(folder / WEIGHTS_NAME)


def convert(source: str, output: Path, form: str, component: str | None) -> str:
    """Read an adapter, check its tensors, write it in the other format, and return the text to show.

    Raises:
        ValueError: the file is damaged, or already in that format; a pipeline couldn't load the adapter, or have such a
            component; `output` is a file; see `chosen`.
    """
    if output.is_file():
        raise ValueError(f"OUTPUT {output} is a file: name a folder.")
    parts = read(source).parts
    if (form == "peft") == (list(parts) == [MODEL]):
        other = next(each for each in FORMS if each != form)
        raise ValueError(f"'{source}' is in the form {form!r} already: choose --to {other}, or use it as it is.")
    if form == "peft":
        part = chosen(parts, component)
        skeleton(part, component or next(iter(parts)))
        to_peft(part, output)
    else:
        if component is None:
            raise ValueError("--to pipeline needs --component, the part that is adapted, such as unet or transformer.")
        if not component.isidentifier():
            raise ValueError(
                f"--component is {component!r}, which is no part of a pipeline: name one, such as unet or transformer."
            )
        check_storable(parts[MODEL].config, component)
        skeleton(parts[MODEL], component)
        to_pipeline(parts[MODEL], component, output)
    return f"{output}: as {form}"


def main(argv: Sequence[str] | None = None) -> None:
    """The command `nara convert`."""
    parser = argparse.ArgumentParser(
        "nara convert", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("file", metavar="FILE", help="the adapter: a file, or a folder")
    parser.add_argument("output", metavar="OUTPUT", type=Path, help="the folder to write")
    parser.add_argument("--to", choices=FORMS, required=True, help="the format to write")
    parser.add_argument("--component", help="the part of a pipeline: unet, transformer, text_encoder, …")
    args = parser.parse_args(argv)
    with in_one_line():
        sys.stdout.write(f"{convert(args.file, args.output, args.to, args.component)}\n")
