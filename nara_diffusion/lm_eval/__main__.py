"""The command `nara-eval`: lm-eval's command with the model class nara_dllm and this package's
tasks.

It takes lm-eval's subcommands and flags, also from a file (--config FILE.yaml). The default of
--model is nara_dllm, and the default subcommand is run:

    nara-eval --model_args pretrained=GSAI-ML/LLaDA-8B-Instruct,peft=outputs/dllm-1 \\
        --tasks llm_adapters_gsm8k
    nara-eval ls tasks
    accelerate launch -m nara_diffusion.lm_eval --model_args … --tasks …   # all GPUs
    nara-eval run --help                                                   # all flags
    nara-eval --config llada_instruct_gsm8k_blocks     # the settings of a published result

presets.yaml has those settings. docs/evaluation.md describes the paper's test sets, the settings of
the sampler, and code benchmarks.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from unittest.mock import patch

import yaml

TASKS, PRESETS = Path(__file__).parent / "tasks", Path(__file__).parent / "presets.yaml"
MODEL = "nara_dllm"


def main(argv: Sequence[str] | None = None) -> None:
    """Run lm-eval's command on `argv`, or on the program's own arguments if None.

    If the user makes an error, the program exits with a message. LMEVAL_LOG_LEVEL=DEBUG shows the
    traceback.
    """
    try:
        from lm_eval._cli import HarnessCLI
        from lm_eval.api.registry import model_registry
        from lm_eval.utils import setup_logging
    except ImportError:
        sys.exit("nara-eval needs lm-eval: pip install 'nara-diffusion[eval]'")
    setup_logging()
    if MODEL not in model_registry:
        model_registry.register(MODEL, target="nara_diffusion.lm_eval.harness_model:NaraDLLM")
    flags = sys.argv[1:] if argv is None else list(argv)
    if not flags or flags[0] in ("-h", "--help"):
        sys.stdout.write(f"{__doc__}\n")
    elif flags[0] not in ("run", "ls", "validate"):
        flags = ["run", *flags]
    with patch.object(sys, "argv", ["nara-eval", *flags]):  # lm-eval's command changes it
        command = HarnessCLI()
        args = command.parse_args()
        try:
            command.execute(with_config(args))
        except (ValueError, OSError, KeyError, ImportError) as error:
            if os.environ.get("LMEVAL_LOG_LEVEL", "").upper() == "DEBUG":
                raise
            message = error.args[0] if isinstance(error, KeyError) else error
            sys.exit(f"nara-eval: {message}")


def with_config(args: argparse.Namespace) -> argparse.Namespace:
    """Add the settings of --config, and this package's tasks and default model and device.

    Flags take precedence. --model_args and --gen_kwargs replace only the entries that they name.

    Raises:
        ValueError, OSError: see `read_config`.
    """
    from lm_eval.utils import simple_parse_args_string

    is_run = hasattr(args, "model")
    file = read_config(args.config) if is_run and args.config is not None else {}
    for name, value in file.items():
        flag = getattr(args, name, None)
        if isinstance(flag, dict):
            entries = simple_parse_args_string(value) if isinstance(value, str) else value
            flag = {**entries, **flag}
        setattr(args, name, value if flag is None or flag is False else flag)
    if hasattr(args, "include_path"):
        folders = args.include_path or []
        args.include_path = [str(TASKS), *([folders] if isinstance(folders, str) else folders)]
    if is_run:
        args.config = None
        args.model = args.model or MODEL
        if args.model == MODEL:
            args.device = args.device or "auto"  # lm-eval's default is cuda:0 on any machine
    return args


def read_config(config: str) -> dict[str, Any]:
    """Return the settings of the file `config`, or of the preset with that name.

    Raises:
        ValueError, OSError: there is no such file or preset, or the file can't be read.
    """
    from lm_eval.config.evaluate_config import EvaluatorConfig

    if Path(config).exists():
        return EvaluatorConfig.load_yaml_config(config)
    presets = yaml.safe_load(PRESETS.read_text(encoding="utf-8"))
    if config not in presets:
        raise ValueError(
            f"--config {config} is not a file, nor one of the presets {', '.join(presets)}."
        )
    return presets[config]


if __name__ == "__main__":
    main()
