"""Warn of prompts that CLIP's tokenizers cut, once a prompt, with its image or its file and line.

Diffusers warns at each encoding, once for each tokenizer, and doesn't know the file.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping
from pathlib import Path

from diffusers.pipelines.pipeline_utils import DiffusionPipeline

from .image_arguments import DreamBoothArguments
from .image_records import ImageRecord

logger = logging.getLogger(__name__)


def warn_of_cut_prompts(pipe: DiffusionPipeline, sources: Mapping[str, str]) -> None:
    """Warn of each prompt that is longer than CLIP's tokenizers allow, and silence Diffusers' warnings.

    Args:
        sources: {prompt: its origin, for the message}.
    """
    logging.getLogger(type(pipe).__module__).addFilter(
        lambda record: "was truncated because CLIP can only" not in record.getMessage()
    )
    parts = pipe.components.values()
    tokenizers = [part for part in parts if "CLIPTokenizer" in type(part).__name__]
    for prompt, source in sources.items():
        for tokenizer in tokenizers:
            limit = tokenizer.model_max_length
            ids = tokenizer(prompt, verbose=False).input_ids
            if len(ids) > limit:
                logger.warning(
                    "the prompt from %s is too long: CLIP reads its first %d tokens and ignores %r. Shorten it.",
                    *(source, limit, tokenizer.decode(ids[limit - 1 : -1])),
                )
                break


def prompt_sources(
    args: DreamBoothArguments,
    records: Iterable[ImageRecord] = (),
) -> dict[str, str]:
    """Return {prompt: its argument, its image, or its file and line} for all prompts of a run."""
    sources: dict[str, str] = {}
    named = {"instance_prompt": args.instance_prompt, "class_prompt": args.class_prompt}
    for name, prompt in named.items():
        if prompt:
            sources.setdefault(prompt.strip(), f"--{name}")
    for record in records:
        sources.setdefault(record.prompt, f"the caption of {record.name}")
    if args.prompts_file is not None:
        lines = Path(args.prompts_file).expanduser().read_text(encoding="utf-8").splitlines()
        for number, line in enumerate(lines, 1):
            sources.setdefault(line.strip(), f"{args.prompts_file}, line {number}")
    for prompt in args.prompts:
        sources.setdefault(prompt, "--validation_prompts")
    return sources
