"""Images by a pipeline's own call, whatever its family calls the arguments."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch

from .table import BY_PIPELINE


def render(pipe: Any, prompts: Sequence[str], generators: Sequence[torch.Generator], call: Mapping[str, Any]) -> Any:
    """Images (b, h, w, 3) in [0, 1] as NumPy has them.

    Args:
        pipe: of a family; another callable is called as it is.
        call: height, width, num_inference_steps, guidance_scale, …, by these names in every family.
    """
    family = BY_PIPELINE.get(type(pipe).__name__)
    told = dict(call) if family is None else family.sampling(dict(call), len(prompts))
    output = pipe(prompt=list(prompts), generator=list(generators), output_type="np", **told)
    return np.asarray(output.images if family is None else family.images_of(output))
