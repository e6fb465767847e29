"""The command `nara`: inspects, converts and evaluates NaRA adapters. λ is the noise level, 1 = pure noise.

    nara inspect FILE            base model, definition of λ, core, rank, modules, parameters, hash
    nara plot FILE               a PNG: distance of C(λ) from I, its singular values, strength over λ
    nara fold FILE OUTPUT        export to plain LoRAs for Diffusers, PEFT, kohya, A1111, ComfyUI
    nara convert FILE OUTPUT     from a pipeline's file to PEFT's folder, or back
    nara check MODEL DATA        whether an adapter that knows λ is likely to beat LoRA, before training
    nara eval …                  lm-eval for masked-diffusion language models
    nara metrics …               subject fidelity and prompt fidelity of images

FILE is a file or a folder of pipe.save_nara_weights (pytorch_nara_weights.safetensors), or a folder of PEFT's
save_pretrained (adapter_config.json). `nara COMMAND --help` says more about each command.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib import import_module

COMMANDS = {
    "inspect": "nara_diffusion.cli.inspect",
    "plot": "nara_diffusion.cli.plot",
    "fold": "nara_diffusion.cli.fold",
    "convert": "nara_diffusion.cli.convert",
    "check": "nara_diffusion.check.cli",
    "eval": "nara_diffusion.lm_eval.__main__",
    "metrics": "nara_diffusion.dreambooth.evaluation.fidelity",
}
"""{command: the module that has its `main`}. The module is imported when the command is called."""


def main(argv: Sequence[str] | None = None) -> None:
    """The command `nara`. An error in what the user gave ends it with one line and status 1, without a traceback."""
    words = list(sys.argv[1:] if argv is None else argv)
    if not words or words[0] in ("-h", "--help"):
        sys.stdout.write(f"{__doc__}\n")
        return
    command, *rest = words
    if command not in COMMANDS:
        sys.exit(f"error: nara has no command {command!r}, expected one of {', '.join(COMMANDS)}; nara --help.")
    before, sys.argv[0] = sys.argv[0], f"nara {command}"  # what argparse calls the program
    try:
        import_module(COMMANDS[command]).main(rest)
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        if package in ("", "nara_diffusion"):
            raise
        how = "pip install -e '.[train,eval]', in a clone of the project"
        sys.exit(f"error: nara {command} needs the package {package}: {how}")
    except (ValueError, OSError) as error:
        if not COMMANDS[command].startswith("nara_diffusion.cli."):
            raise
        sys.exit(f"error: {error}")
    finally:
        sys.argv[0] = before
