"""Assign separate λ to parts of a sample, such as blocks of a text or frames of a video.

    λ (b, k)   C (b·k, r, r)   a layer's input (b, l, …) is seen as (b·k, l / k, …)

The k parts are equal and consecutive, so this view copies nothing. k and l belong to the forward
and travel with C. If a layer sees anything other than the l positions of b samples in order, an
error with its name is raised. Sizes alone cannot show this: in Wan, `attn2.to_k` sees 512 text
tokens, and 8 frames would divide 512.

Video denoisers declare with `FrameTokens` which layers see other inputs. Layers that see something
of the whole sample, such as its text, take the sample's largest λ.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

RowKind = Literal["samples", "tokens", "routed tokens", "positions"]
"""What the rows of a layer's input are.

    "samples"        (b, …)
    "tokens"         (b·l, d) beside a mixture of experts: the tokens of all samples in order
    "routed tokens"  (n, d) in an expert
    "positions"      (l, b, d) in PyTorch's attention without `batch_first`, or ids (l, l) of
                     relative positions
"""

_SEQUENCES = (
    "input_ids", "inputs_embeds", "hidden_states",
    "decoder_input_ids", "decoder_inputs_embeds", "encoder_hidden_states",
)  # fmt: skip
"""The arguments of a forward that hold positions, ids (b, l) or features (b, l, d)."""


@dataclass(frozen=True)
class Positions:
    """The positions that the layers see in one forward."""

    samples: int  # b
    length: int  # l
    timesteps: int = 1  # of each sample, for a denoiser


@dataclass(frozen=True)
class Parts:
    """The assignment of λ (b, k) to the positions of one forward.

    Attributes:
        count: k, the number of parts in a sample.
        positions: b and l.
        frames: where the layers of a denoiser see frames; None for other models.
    """

    count: int
    positions: Positions
    frames: FrameTokens | None = None

    def levels(self, level: Tensor) -> Tensor:
        """Return λ (b·k,), one value for each row of C, for λ (b or 1, k).

        For a denoiser, append the largest λ of each sample, so the result is (b·k + b,).
        """
        level = level.expand(self.positions.samples, self.count)
        if self.frames is None:
            return level.reshape(-1)
        return torch.cat([level.reshape(-1), level.amax(1)])

    def core_of_layer(
        self, core: Tensor, x: Tensor, *, kind: RowKind, is_image: bool, layer_name: str
    ) -> tuple[Tensor, bool]:
        """Return C for the input of a layer, and whether C has one row for each part.

        Args:
            core: C at the values of λ that `levels` returns.
            x: the input of the layer, features (b, l, …, d) or ids (b, l).
            is_image: whether the layer is a convolution.

        Returns:
            C (b·k, r, r), for x viewed as (b·k, l / k, …), and True; or C (b, r, r) at the largest
            λ of each sample, and False.

        Raises:
            ValueError: the layer does not see the positions in order.
        """
        rows = self.positions.samples * self.count
        if self.frames is not None:
            has_one_time = self.positions.timesteps == 1 and self.frames.times.fullmatch(layer_name)
            if has_one_time or self.frames.per_sample.fullmatch(layer_name):
                return core[rows:], False
        if not is_image and self._sees_positions(x, kind, layer_name):
            return core if len(core) == rows else core[:rows], True
        raise ValueError(
            f"noise_level has {self.count} values for the {self.positions.length} positions of a sample, but layer "
            f"'{layer_name}' sees {tuple(x.shape)}, not these positions of {self.positions.samples} samples in order: "
            "pass one value per sample, or leave the layer out with `exclude_modules`."
        )

    def _sees_positions(self, x: Tensor, kind: RowKind, layer_name: str) -> bool:
        samples, length = self.positions.samples, self.positions.length
        if self.frames is not None and self.frames.times.fullmatch(layer_name):
            rows = x.shape[:-1].numel()
            counts = (samples * self.positions.timesteps, samples * length)
            return rows in counts and rows % (samples * self.count) == 0
        if kind == "tokens" and x.dim() == 2:
            return len(x) == samples * length
        axes = 3 if x.is_floating_point() else 2
        return (
            kind in ("samples", "tokens") and x.dim() >= axes and x.shape[:2] == (samples, length)
        )


@dataclass(frozen=True)
class FrameTokens:
    """The layout of a video's frames in the inputs of a denoiser's layers.

    The denoiser's `hidden_states` have five axes. Its layers see the patches of the first frame,
    then the patches of the second frame, and so on.

    Attributes:
        per_sample: names of layers that see another part of each sample, such as its text. They take
            the sample's largest λ.
        times: names of layers with one input row for each timestep or each patch of all samples, in
            order, counted over all axes but the last.
        axis: the frame axis in `hidden_states`: 2 in (b, c, f, h, w), 1 in (b, f, c, h, w).
    """

    per_sample: re.Pattern[str]
    times: re.Pattern[str]
    axis: int = 2

    def shape(self, model: nn.Module, arguments: Mapping[str, object]) -> tuple[int, int] | None:
        """Return how many frames and positions a sample has, or None if there is no video."""
        video, config = arguments.get("hidden_states"), getattr(model, "config", None)
        if not isinstance(video, Tensor) or video.dim() != 5 or config is None:
            return None
        patch = config.patch_size  # (frames, height, width)
        frames = video.shape[self.axis] // patch[0]
        return frames, frames * (video.shape[3] // patch[1]) * (video.shape[4] // patch[2])

    def by_frame(
        self, timestep: Tensor, model: nn.Module, arguments: Mapping[str, object]
    ) -> Tensor | None:
        """Return timesteps (b, …), one for each frame or patch, as (b, frames, n).

        Return None if the timesteps are neither one per frame nor one per patch.
        """
        shape = self.shape(model, arguments)
        if shape is None or timestep.dim() < 2 or timestep.shape[1:].numel() not in shape:
            return None
        return timestep.reshape(len(timestep), shape[0], -1)

    def positions(self, model: nn.Module, arguments: Mapping[str, object]) -> Positions | None:
        """Return the positions of a forward, or None if there is no video."""
        shape, video = self.shape(model, arguments), arguments.get("hidden_states")
        if shape is None or not isinstance(video, Tensor):
            return None
        timestep = arguments.get("timestep")
        timesteps = timestep.shape[1:].numel() if isinstance(timestep, Tensor) else 1
        return Positions(len(video), shape[1], timesteps)


def parts_of(level: Tensor, positions: Positions, frames: FrameTokens | None = None) -> Parts:
    """Return the assignment of λ (b or 1, k) to the positions of one forward.

    Raises:
        ValueError: b differs from the forward's batch size, or k does not divide l.
    """
    rows, count = level.shape
    samples, length = positions.samples, positions.length
    if rows not in (1, samples) or length % count:
        raise ValueError(
            f"noise_level has shape ({rows}, {count}), but this forward has {samples} samples of {length} positions: "
            "pass (b, k) with one row a sample and a k that divides the positions."
        )
    return Parts(count, positions, frames)


def positions_of(arguments: Mapping[str, object], model_name: str) -> Positions:
    """Return the positions of a forward that gets one sequence: ids (b, l) or features (b, l, d).

    The sequence is the argument with a name that language models use for it. If there is no such
    argument, it is the first tensor.

    Raises:
        ValueError: the forward gets no sequence, or several.
    """
    tensors = {name: value for name, value in arguments.items() if isinstance(value, Tensor)}
    named = [name for name in _SEQUENCES if name in tensors]
    named = named or list(tensors)[:1]
    sequence = tensors[named[0]] if len(named) == 1 else None
    if sequence is None or sequence.dim() < 2 + sequence.is_floating_point():
        raise ValueError(
            f"noise_level has several values a sample, but this forward of {model_name} has no single sequence of "
            "positions, ids (b, l) or features (b, l, d): pass one value per sample."
        )
    return Positions(sequence.shape[0], sequence.shape[1])
