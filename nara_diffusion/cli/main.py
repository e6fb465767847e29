"""The command `nara`: looks at adapters, checks whether λ helps, evaluates.

    nara inspect FILE            what it is: base, λ, core, rank, modules, parameters, hash
    nara plot FILE               how far C(λ) is from I, its singular values, strength over λ: a PNG
    nara diff FILE OTHER         where two adapters differ: configuration, modules, ΔW over λ
    nara fold FILE OUTPUT        a plain LoRA of one λ for Diffusers, PEFT, kohya, A1111, ComfyUI
    nara convert FILE OUTPUT     from a pipeline's file to PEFT's folder, or back
    nara check MODEL DATA        whether λ is likely to help a training, before it
    nara chat MODEL              talk with a masked-diffusion language model, with an adapter or without
    nara eval …                  lm-eval for masked-diffusion language models
    nara metrics …               subject fidelity and prompt fidelity of images

FILE is what save_nara_weights wrote (pytorch_nara_weights.safetensors), what PEFT's save_pretrained wrote (a folder
with adapter_config.json), or a folder that holds either. `nara COMMAND --help` says more of each.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from importlib import import_module

COMMANDS = {
    "inspect": "nara_diffusion.cli.inspect",
    "plot": "nara_diffusion.cli.plot",
    "diff": "nara_diffusion.cli.diff",
    "fold": "nara_diffusion.cli.fold",
    "convert": "nara_diffusion.cli.convert",
    "check": "nara_diffusion.check.cli",
    "chat": "nara_diffusion.cli.chat",
    "eval": "nara_diffusion.harness.command",
    "metrics": "nara_diffusion.dreambooth.evaluation.cli",
}
"""{command: the module that has its `main`}. The module is imported when the command is called."""


def main(argv: Sequence[str] | None = None) -> None:
    """The command `nara`. An error that the user can mend ends it with one line."""
    words = list(sys.argv[1:] if argv is None else argv)
    if not words or words[0] in ("-h", "--help"):
        sys.stdout.write(f"{__doc__}\n")
        return
    command, *rest = words
    if command not in COMMANDS:
        sys.exit(f"error: nara has no command {command!r}, expected one of {', '.join(COMMANDS)}; nara --help.")
    _main_of(command)(rest)


def _main_of(command: str) -> Callable[[Sequence[str]], None]:
    try:
        return import_module(COMMANDS[command]).main
    except ModuleNotFoundError as error:
        if (error.name or "").startswith("nara_diffusion"):
            raise
        sys.exit(f"error: nara {command} needs {error.name}: pip install 'nara-diffusion[train,eval]'")
