"""The meaning of the rows of a layer's input: samples, unless the modules around the layer say otherwise.

An adapted layer normally sees (b, …), and each row has its value of λ. Where rows are something else, shapes do not
show it, since their number may equal b by chance. So this file lists the modules for which it is known.

    "tokens"      (n, d) inside of what has experts: the tokens of all samples, or those that one expert gets
    "positions"   (l, b, d): beside PyTorch's attention unless `batch_first`; and ids (l, l) of relative positions
"""

from __future__ import annotations

from typing import Any, Literal

from peft.tuners.lora.layer import Embedding
from torch import Tensor, nn

Rows = Literal["samples", "tokens", "positions"]

_RELATIVE = ("relative_attention_bias", "distance_embedding")


def rows_of(root: nn.Module, name: str) -> Rows:
    """The meaning of the rows of the input of layer `name` below `root`, from the modules around it."""
    module: Any = root
    around = []
    for part in name.split("."):
        around.append(module)
        module = getattr(module, part)
    if any(hasattr(outer, "experts") or "Experts" in type(outer).__name__ for outer in around):
        return "tokens"
    if isinstance(module, (nn.Embedding, Embedding)):
        return "positions" if name.endswith(_RELATIVE) else "samples"
    return "positions" if any(map(_is_length_first, around)) else "samples"


def _is_length_first(module: Any) -> bool:
    attentions = (one for one in module._modules.values() if isinstance(one, nn.MultiheadAttention))
    return any(getattr(one, "batch_first", None) is False for one in (module, *attentions))


def check_rows(rows: Rows, x: Tensor, samples: int, layer_name: str) -> None:
    """Refuse several values of λ where the rows of `x` are not samples.

    Raises:
        ValueError: λ has several values, and the rows of `x` are tokens or positions.
    """
    if samples > 1 and (
        (rows == "tokens" and x.dim() == 2) or (rows == "positions" and x.dim() > x.is_floating_point() + 1)
    ):
        raise ValueError(
            f"noise_level has {samples} values, but the rows that layer '{layer_name}' sees, {tuple(x.shape)}, are "
            f"{rows}, not samples: one value belongs to each row of a layer's input (b, …). Pass one value for the "
            "whole batch, or leave the layer out by `exclude_modules`."
        )
