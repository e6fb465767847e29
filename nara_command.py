"""The command `nara`: inspect, convert and evaluate NaRA adapters. λ is the noise level, 1 = pure noise.

    nara inspect FILE            show base model, definition of λ, core, rank, modules, parameters, hash
    nara plot FILE               draw C(λ) and the strength over λ as a PNG
    nara fold FILE OUTPUT        write a plain LoRA for Diffusers, PEFT, kohya, A1111, ComfyUI
    nara convert FILE OUTPUT     change the file format: a pipeline's, PEFT's, LyCORIS'
    nara eval …                  run lm-eval on masked-diffusion language models

FILE is what pipe.save_nara_weights wrote (pytorch_nara_weights.safetensors, or its folder), or the folder that PEFT's
save_pretrained wrote (adapter_config.json). `nara COMMAND --help` says more about each command.
"""

# Outside of the package, whose import takes seconds (torch, peft, diffusers): help and wrong flags need none of it.

from __future__ import annotations

import argparse
import ast
import sys
from collections.abc import Callable, Sequence
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

OWN = ("inspect", "plot", "fold", "convert")
"""The commands whose flags are defined here; each is a function of `nara_diffusion.cli.commands`."""
COMMANDS = dict.fromkeys(OWN, "nara_diffusion.cli.commands") | {
    "eval": "nara_diffusion.lm_eval.__main__",
}
"""{command: its module}, which is imported when the command runs. Help is the docstring of the function or module."""
HELP = ("-h", "--help")


def main(argv: Sequence[str] | None = None) -> None:
    """The command `nara`. An error in what the user gave ends it with one line and status 1, without a traceback."""
    words = list(sys.argv[1:] if argv is None else argv)
    if not words or words[0] in HELP:
        sys.stdout.write(f"{__doc__}\n")
        return
    command, *flags = words
    if command not in COMMANDS:
        sys.exit(
            f"error: nara has no command {command!r}, expected one of {', '.join(COMMANDS)}. See nara --help."
        )
    try:
        if command in OWN:
            args = parser_of(command).parse_args(flags)
            sys.stdout.write(f"{getattr(import_module(COMMANDS[command]), command)(args)}\n")
        elif flags and flags[0] in HELP:
            sys.stdout.write(f"{help_of(command)}\n")
        else:
            import_module(COMMANDS[command]).main(flags)
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        if package in ("", "nara_diffusion"):
            raise
        extras = "pip install 'nara-diffusion[train,eval]'"
        sys.exit(f"error: nara {command} needs the package {package}: {extras}")
    except (ValueError, OSError) as error:
        if command not in OWN:
            raise
        sys.exit(f"error: {error}")


def evaluate() -> None:
    """The command nara-eval."""
    main(["eval", *sys.argv[1:]])


def help_of(command: str) -> str:
    """The docstring of a command, whose module isn't imported."""
    package = Path(str(find_spec("nara_diffusion").origin)).parent  # type: ignore[union-attr]
    source = (
        package.joinpath(*COMMANDS[command].split(".")[1:])
        .with_suffix(".py")
        .read_text(encoding="utf-8")
    )
    module: Any = ast.parse(source)
    functions = [
        node for node in module.body if isinstance(node, ast.FunctionDef) and node.name == command
    ]
    return ast.get_docstring(functions[0] if command in OWN else module) or ""


def parser_of(command: str) -> argparse.ArgumentParser:
    """The flags of one of `OWN`."""
    parser = argparse.ArgumentParser(
        f"nara {command}",
        description=help_of(command),
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("file", metavar="FILE", help="the adapter: a file, or a folder")
    {"inspect": _inspect, "plot": _plot, "fold": _fold, "convert": _convert}[command](
        parser.add_argument
    )
    return parser


def _inspect(add: Callable[..., Any]) -> None:
    add("--json", action="store_true", help="print JSON")


def _plot(add: Callable[..., Any]) -> None:
    add(
        "--output",
        type=Path,
        help="the PNG file to write (default: FILE's name with .png, in this folder)",
    )
    add(
        "--points",
        type=int,
        default=101,
        help="how many λ from 0 to 1 to draw, at least 2 (default: %(default)s)",
    )
    _overwrite(add)


def _fold(add: Callable[..., Any]) -> None:
    add(
        "output",
        metavar="OUTPUT",
        type=Path,
        help="the .safetensors file to write; with --form peft, a folder",
    )
    which = "the λ to fold at, from 0 (the image) to 1 (pure noise), or best: the LoRA that is nearest over all λ"
    add("--noise_level", type=_level, required=True, metavar="LEVEL", help=which)
    add(
        "--form",
        choices=("diffusers", "kohya", "comfyui", "peft"),
        default="diffusers",
        help="the format to write (default: %(default)s). ComfyUI reads diffusers only for FLUX, SD3 and Qwen-Image; "
        "only diffusers and peft can hold a DoRA",
    )
    bases = ("sd15", "sdxl", "sd3", "flux", "wan")
    add(
        "--base",
        choices=bases,
        help="the model that the adapter was trained on; kohya and comfyui need it",
    )
    add("--component", help="which part of a pipeline: transformer, transformer_2, text_encoder, …")
    _overwrite(add)


def _level(text: str) -> float | str:
    try:
        return text if text == "best" else float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(
            f"expected a number in [0, 1], or best, got {text!r}"
        ) from None


def _convert(add: Callable[..., Any]) -> None:
    add("output", metavar="OUTPUT", type=Path, help="the folder to write")
    forms = ("peft", "pipeline", "lycoris")
    add("--to", "--form", choices=forms, required=True, help="the format to write")
    add("--component", help="which part of a pipeline: unet, transformer, text_encoder, …")
    bases = ("sd15", "sdxl", "sd3", "flux", "wan")
    add("--base", choices=bases, help="with --to lycoris, for ComfyUI: the model of the adapter")
    add("--base_model", help="for a T-LoRA of LyCORIS: the folder or Hub id of its base model")
    _overwrite(add)


def _overwrite(add: Callable[..., Any]) -> None:
    add("--overwrite", action="store_true", help="replace files that already exist")


if __name__ == "__main__":
    main()
