"""Warn of prompts that CLIP's tokenizers cut, once a prompt, with the file and line of the prompt.

Diffusers warns at each encoding, once for each tokenizer, and doesn't know the file.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from diffusers.pipelines.pipeline_utils import DiffusionPipeline

from .captions import METADATA_FILE
from .image_arguments import DreamBoothArguments
from .image_records import ImageRecord

logger = logging.getLogger(__name__)


def warn_of_cut_prompts(pipe: DiffusionPipeline, sources: Mapping[str, str]) -> None:
    """Warn of each prompt that is longer than CLIP's tokenizers allow, and silence Diffusers' warnings.

    Args:
        sources: {prompt: its file and line, or its argument}.
    """
    logging.getLogger(type(pipe).__module__).addFilter(_is_other_message)
    tokenizers = [
        part for part in pipe.components.values() if "CLIPTokenizer" in type(part).__name__
    ]
    for prompt, source in sources.items():
        for tokenizer in tokenizers:
            rest = _cut_part(tokenizer, prompt)
            if rest:
                limit = tokenizer.model_max_length
                logger.warning(
                    "%s: CLIP reads %d tokens, without %r: shorten it", source, limit, rest
                )
                break


def _cut_part(tokenizer: Any, prompt: str) -> str:
    """Return the end of the prompt that the tokenizer leaves out, or ""."""
    ids = tokenizer(prompt, verbose=False).input_ids
    if len(ids) <= tokenizer.model_max_length:
        return ""
    return tokenizer.decode(ids[tokenizer.model_max_length - 1 : -1])


def _is_other_message(record: logging.LogRecord) -> bool:
    return "was truncated because CLIP can only" not in record.getMessage()


def prompt_sources(
    args: DreamBoothArguments, records: Iterable[ImageRecord] = ()
) -> dict[str, str]:
    """Return {prompt: its file and line, or its argument} for all prompts of a run."""
    sources: dict[str, str] = {}
    named = {"instance_prompt": args.instance_prompt, "class_prompt": args.class_prompt}
    for name, prompt in named.items():
        if prompt:
            sources.setdefault(prompt.strip(), name)
    for record in records:
        if record.prompt not in sources:
            sources[record.prompt] = _caption_source(Path(record.name))
    if args.prompts_file is not None:
        path = Path(args.prompts_file).expanduser()
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
            sources.setdefault(line.strip(), f"{path}, line {number}")
    for prompt in args.prompts or ():
        sources.setdefault(prompt, "validation_prompts")
    return sources


def _caption_source(image: Path) -> str:
    """Return the file of an image's caption, with the line in metadata.jsonl."""
    metadata = image.parent / METADATA_FILE
    if not metadata.is_file():
        return str(image.with_suffix(".txt"))
    for number, line in enumerate(metadata.read_text(encoding="utf-8-sig").split("\n"), 1):
        if line.strip() and json.loads(line)["file_name"] == image.name:
            return f"{metadata}, line {number}"
    return str(metadata)
