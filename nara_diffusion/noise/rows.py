"""Map λ of the samples to C for the rows that a layer sees.

    one for all     λ (1,)   C (1, r, r)   for every row
    one per sample  λ (b,)   C (b, r, r)   row i of a layer's input (b, …) is sample i
    b · k rows      λ (b,)   C (b, r, r)   rows i·k to i·k + k − 1 are sample i: frames, tokens
    k · b rows      λ (b,)   C (b, r, r)   all samples, k times over: at their timesteps and at 0
    guidance        λ (b,)   λ (2b,)       the samples, then the same samples again
    k parts         λ (b, k)               parts of a sample's positions: see `parts`

Shapes do not show what a row is: the number of tokens may equal the batch size by chance. It is
therefore declared for each model (`ModelRows`) and determined for each layer (`row_kind_of`). If
rows cannot be assigned to samples, different values of λ raise an error, while one value for the
whole batch works. Only in this case are the values read on the host, to compare them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from peft.tuners.lora.layer import Embedding
from torch import Tensor, nn

from .context import outer_modules
from .level import arguments_of
from .parts import Parts, RowKind, parts_of, positions_of
from .timesteps import DenoiserNoise

Repetition = Literal["tiled", "interleaved"]
"""The order of rows that are repeated k times: "tiled" abab, "interleaved" aabb."""
REPETITIONS: tuple[Repetition, ...] = ("tiled", "interleaved")


def repeat_rows(values: Tensor, times: int, order: Repetition) -> Tensor:
    """Return `values` (b, …) of samples, repeated for b · `times` rows, as (b · times, …)."""
    if order == "interleaved":
        return values.repeat_interleave(times, dim=0)
    return torch.cat([values] * times)


def guidance_rows(values: Tensor) -> Tensor:
    """Return `values` (b, …) of samples, repeated for the 2b rows of classifier-free guidance.

    The conditional rows come first. Both rows of a sample have the same λ.
    """
    return repeat_rows(values, 2, "tiled")


def core_of_rows(
    core: Tensor,
    x: Tensor,
    *,
    kind: RowKind,
    sample_major: bool,
    tiled: bool = False,
    layer_name: str,
) -> Tensor:
    """Return C for each row of a layer's input.

    Args:
        core: C of the samples, (b, r, r), or (1, r, r) for all samples.
        x: the input of the layer, (rows, …).
        sample_major: whether the layer may see b · k rows, k consecutive rows for each sample.
        tiled: whether it may see all samples, k times over.

    Returns:
        C (rows, r, r), or (1, r, r) if all rows have the same C.

    Raises:
        ValueError: there are different values of λ, and the rows cannot be assigned to samples.
    """
    samples, rows = core.shape[0], x.shape[0]
    if samples == 1:
        return core
    are_tokens = kind in ("tokens", "routed tokens") and x.dim() == 2
    axes = 3 if x.is_floating_point() else 2  # features (l, b, d), or integer ids (l, l)
    if are_tokens or (kind == "positions" and x.dim() >= axes):
        return _the_only(
            core,
            f"the rows that layer '{layer_name}' sees, {tuple(x.shape)}, are {kind}, not samples",
            "leave the layer out with `exclude_modules`",
        )
    if samples == rows:
        return core
    if rows == 0:  # an expert without tokens: A and B get gradients of zero
        return core[:1]
    if (sample_major or tiled) and rows % samples == 0:
        return repeat_rows(core, rows // samples, "tiled" if tiled else "interleaved")
    return _the_only(
        core,
        f"the batch inside layer '{layer_name}' is {rows}",
        "one per row as the layer sees them (after beams, repeats or CFG)",
    )


def _the_only(values: Tensor, reason: str, remedy: str) -> Tensor:
    """Return the first of `values` (b, …) as (1, …) after reading them to check that all are equal.

    Raises:
        ValueError: the values differ.
    """
    if not bool((values == values[:1]).all()):
        raise ValueError(_cannot_assign(len(values), reason, remedy))
    return values[:1]


def row_kind_of(root: nn.Module, name: str) -> RowKind:
    """Return the kind of rows that layer `name` in `root` sees, judged by the modules around it."""
    layer: nn.Module = root
    around = []
    for part in name.split("."):
        around.append(layer)
        layer = getattr(layer, part)
    if any("Experts" in type(outer).__name__ for outer in around) or ".experts." in f".{name}.":
        return "routed tokens"
    if any(hasattr(outer, "experts") for outer in around):
        return "tokens"
    if isinstance(layer, (nn.Embedding, Embedding)):
        is_position = name.endswith(("relative_attention_bias", "distance_embedding"))
        return "positions" if is_position else "samples"
    inner = [module for outer in around for module in outer._modules.values()]
    attention = [module for module in inner if isinstance(module, nn.MultiheadAttention)]
    if any(getattr(module, "batch_first", None) is False for module in (*around, *attention)):
        return "positions"
    return "samples"


@dataclass(frozen=True)
class ModelRows:
    """A description of how the layers of a model see its batch.

    Attributes:
        source: the table's entry for a denoiser's class. For other models, it is a default, and
            the layers see one row for each sample.
        is_denoiser: whether the model is a denoiser, so only `source.frames` says where its layers
            see parts of a sample.
    """

    source: DenoiserNoise = field(default_factory=DenoiserNoise)
    is_denoiser: bool = False

    def parts_of_forward(
        self, level: Tensor, root: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]
    ) -> Parts:
        """Return the assignment of λ (b or 1, k) to the positions of a forward of the whole model.

        Raises:
            ValueError: the forward does not have b samples, or k does not divide their length.
        """
        arguments, kind = arguments_of(root, args, kwargs), type(root).__name__
        frames = self.source.frames
        positions = None if frames is None else frames.positions(root, arguments)
        if positions is not None:
            return parts_of(level, positions, frames)
        if self.is_denoiser:
            raise ValueError(
                f"noise_level has shape {tuple(level.shape)}, but the layers of {kind} aren't known to see the frames "
                "of a video in order: pass one value per sample."
            )
        return parts_of(level, positions_of(arguments, kind))

    def level_of_forward(
        self, level: Tensor, root: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]
    ) -> Tensor:
        """Return λ (b,) or (1,) for a forward of the whole model that was given λ (b,).

        Raises:
            ValueError: the values of λ differ, but the layers' first axis is not the sample axis.
                Or the layers may see multiples of the batch, but the number of values is not the
                length of the first tensor, or blocks split the batch.
        """
        values, kind, source = len(level), type(root).__name__, self.source
        if values > 1 and (source.one_level or source.packed):
            return _the_only(
                level,
                f"the layers of {kind} see tokens where others see samples",
                "run the samples one by one",
            )
        if values == 1 or not (source.sample_major or source.tiled):
            return level
        arguments = arguments_of(root, args, kwargs).values()
        tensors = [x for x in arguments if isinstance(x, Tensor) and x.dim() > 0]
        batch = len(tensors[0]) if tensors else None
        if values != batch:
            return _the_only(
                level,
                f"the batch is {batch}",
                "one per sample as the model sees them (after CFG or repeats)",
            )
        for module in outer_modules(root):
            settings = vars(module)
            is_split = (
                type(module).__name__ == "SplitInferenceModule" and settings.get("split_dim") == 0
            )
            is_chunked = settings.get("_chunk_size") is not None and settings.get("_chunk_dim") == 0
            if is_split or is_chunked:
                return _the_only(
                    level,
                    f"blocks of {kind} run on slices of the batch (forward chunking, or FreeNoise's "
                    "split inference)",
                    "turn that off (chunking along dim=1 is fine)",
                )
        return level

    def level_of_part(self, level: Tensor) -> Tensor:
        """Return λ (b,) or (1,) for a part of the model that is called directly.

        Args:
            level: λ of the context, (1,), (b,) or (b, k).

        Raises:
            RuntimeError: there are several values, but layers may see several rows for each sample,
                or their first axis is not the sample axis; or k > 1.
        """
        has_parts = level.dim() == 2 and level.shape[1] > 1
        source = self.source
        has_other_rows = source.sample_major or source.tiled or source.one_level or source.packed
        if has_parts or (len(level) > 1 and has_other_rows):
            raise RuntimeError(
                _cannot_assign(
                    level.numel(),
                    "a part of a model, called by itself, may see several rows a sample",
                    "call the whole model",
                )
            )
        return level.reshape(-1)


def _cannot_assign(values: int, reason: str, remedy: str) -> str:
    """Return the error message about rows that cannot be assigned to samples."""
    return (
        f"noise_level has {values} values, but {reason}: pass one value for the whole batch, or "
        f"{remedy}."
    )
