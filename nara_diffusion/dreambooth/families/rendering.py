"""Images by a pipeline's own call, with the same names of arguments for each family."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch

from .family import Family
from .table import BY_PIPELINE
from .unet.long_prompts import is_long, long_prompt_call


def render(pipe: Any, prompts: Sequence[str], generators: Sequence[torch.Generator], call: Mapping[str, Any]) -> Any:
    """Images (b, h, w, 3) in [0, 1], a NumPy array.

    Args:
        pipe: a pipeline of a family; any other callable gets `call` unchanged.
        prompts: (b). generators: one for each image.
        call: height, width, num_inference_steps, guidance_scale, …, by these names for every family; for families that
            read prompts in chunks max_sequence_length too.
    """
    family = BY_PIPELINE.get(type(pipe).__name__)
    told = dict(call) if family is None else family.sampling(dict(call), len(prompts))
    told = {"prompt": list(prompts), **told} if family is None else with_prompts(pipe, family, prompts, told)
    output = pipe(generator=list(generators), output_type="np", **told)
    return np.asarray(output.images if family is None else family.images_of(output))


def with_prompts(pipe: Any, family: Family, prompts: Sequence[str], call: Mapping[str, Any]) -> dict[str, Any]:
    """`call` with the prompts, or, if max_sequence_length is more than the pipeline reads, with their embeddings."""
    if not family.in_chunks or "max_sequence_length" not in call:
        return {"prompt": list(prompts), **call}
    rest = {name: value for name, value in call.items() if name != "max_sequence_length"}
    length = call["max_sequence_length"]
    if not is_long(length):
        return {"prompt": list(prompts), **rest}
    read = {name: rest[name] for name in ("guidance_scale", "clip_skip") if name in rest}
    return {**long_prompt_call(pipe, prompts, length, **read), **rest}
