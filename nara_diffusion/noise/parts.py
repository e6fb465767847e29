"""λ of parts of a sample: blocks of a text, frames of a video.

    λ (b, k)   C (b·k, r, r)   a layer's input (b, l, …) is seen as (b·k, l / k, …)

The k parts are equal and consecutive, so this view copies nothing. k and l belong to the forward
and travel with C. A layer that sees anything else than the l positions of b samples in order raises
an error with its name, whatever its sizes are. In Wan, `attn2.to_k` sees 512 text tokens, which 8
frames would divide.

Denoisers of videos declare with `FrameTokens` which layers see other things. Those of a whole
sample, its text for example, take the sample's largest λ.
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

_SEQUENCES = ("input_ids", "inputs_embeds", "hidden_states")
"""The arguments of a forward that hold its positions: ids (b, l) or features (b, l, d)."""
_OTHERS = ("decoder_input_ids", "decoder_inputs_embeds", "encoder_hidden_states")
"""Arguments that hold other positions, which layers might also see."""


@dataclass(frozen=True)
class Positions:
    """The positions that the layers see in one forward.

    Attributes:
        samples: b.
        length: l, for each sample.
        timesteps: the number of timesteps that a denoiser gets for each sample.
    """

    samples: int
    length: int
    timesteps: int = 1


@dataclass(frozen=True)
class Parts:
    """How λ (b, k) belongs to the positions of one forward.

    Attributes:
        count: k.
        positions: b and l.
        frames: what the layers of a denoiser see; None for other models.
    """

    count: int
    positions: Positions
    frames: FrameTokens | None = None

    def levels(self, level: Tensor) -> Tensor:
        """Return λ of all rows of C for λ (b or 1, k): (b·k,).

        For a denoiser, the largest λ of each sample follows: (b·k + b,).
        """
        level = level.expand(self.positions.samples, self.count)
        if self.frames is None:
            return level.reshape(-1)
        return torch.cat([level.reshape(-1), level.amax(1)])

    def core_of_layer(
        self, core: Tensor, x: Tensor, *, kind: RowKind, is_image: bool, layer_name: str
    ) -> tuple[Tensor, bool]:
        """Return C for the input of a layer, and whether its rows are those of parts.

        Args:
            core: C of `levels`.
            x: the input of the layer, features (b, l, …, d) or ids (b, l).
            kind: what its rows are.
            is_image: whether the layer is a convolution.
            layer_name: for the declaration and the error message.

        Returns:
            C (b·k, r, r), for x seen as (b·k, l / k, …), and True; or C (b, r, r) of the samples'
            largest λ, and False.

        Raises:
            ValueError: the layer does not see the positions in order.
        """
        rows = self.positions.samples * self.count
        if self.frames is not None and self._is_of_samples(layer_name):
            return core[rows:], False
        if not is_image and self._sees_positions(x, kind, layer_name):
            return core if len(core) == rows else core[:rows], True
        raise ValueError(
            f"noise_level has {self.count} values for the {self.positions.length} positions of a sample, but layer "
            f"'{layer_name}' sees {tuple(x.shape)}, not these positions of {self.positions.samples} samples in order: "
            "pass one value per sample, or leave the layer out with `exclude_modules`."
        )

    def _is_of_samples(self, layer_name: str) -> bool:
        """Return whether a layer of a denoiser sees something else than the frames of a sample."""
        assert self.frames is not None
        has_one_time = self.positions.timesteps == 1 and self.frames.times.fullmatch(layer_name)
        return bool(has_one_time or self.frames.whole.fullmatch(layer_name))

    def _sees_positions(self, x: Tensor, kind: RowKind, layer_name: str) -> bool:
        samples, length = self.positions.samples, self.positions.length
        if self.frames is not None and self.frames.times.fullmatch(layer_name):
            rows = x.shape[:-1].numel()
            known = (samples * self.positions.timesteps, samples * length)
            return rows in known and rows % (samples * self.count) == 0
        if kind == "tokens" and x.dim() == 2:
            return len(x) == samples * length
        axes = 3 if x.is_floating_point() else 2
        return (
            kind in ("samples", "tokens") and x.dim() >= axes and x.shape[:2] == (samples, length)
        )


@dataclass(frozen=True)
class FrameTokens:
    """Where the layers of a denoiser see the frames of a video.

    Its `hidden_states` have five axes. Its layers see the patches of the first frame, then those of
    the next one.

    Attributes:
        whole: names of layers that see something else of each sample, such as its text. They take
            the sample's largest λ.
        times: names of layers that see one row for each timestep, or each patch, of all samples in
            order, over all axes but the last.
        axis: the axis of frames in `hidden_states`, 2 in (b, c, f, h, w), 1 in (b, f, c, h, w).
    """

    whole: re.Pattern[str]
    times: re.Pattern[str]
    axis: int = 2

    def shape(self, model: nn.Module, arguments: Mapping[str, object]) -> tuple[int, int] | None:
        """Return how many frames and positions a sample has; None without a video."""
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

        None stands for timesteps that are neither.
        """
        shape = self.shape(model, arguments)
        if shape is None or timestep.dim() < 2 or timestep.shape[1:].numel() not in shape:
            return None
        return timestep.reshape(len(timestep), shape[0], -1)

    def positions(self, model: nn.Module, arguments: Mapping[str, object]) -> Positions | None:
        """Return the positions of a forward; None without a video."""
        shape, video = self.shape(model, arguments), arguments.get("hidden_states")
        if shape is None or not isinstance(video, Tensor):
            return None
        timestep, timesteps = arguments.get("timestep"), 1
        if isinstance(timestep, Tensor) and timestep.dim() > 1:
            timesteps = timestep.shape[1:].numel()
        return Positions(len(video), shape[1], timesteps)


def parts_of(level: Tensor, positions: Positions, frames: FrameTokens | None = None) -> Parts:
    """Return how λ (b or 1, k) belongs to the positions of one forward.

    Raises:
        ValueError: b differs from that of the forward, or k does not divide l.
    """
    given, count = level.shape
    samples, length = positions.samples, positions.length
    if given not in (1, samples) or length % count:
        raise ValueError(
            f"noise_level has shape ({given}, {count}), but this forward has {samples} samples of {length} positions: "
            "pass (b, k) with one row a sample and a k that divides the positions."
        )
    return Parts(count, positions, frames)


def positions_of(arguments: Mapping[str, object], model_name: str) -> Positions:
    """Return the positions of a forward that gets one sequence: ids (b, l) or features (b, l, d).

    It is the argument with a name that language models use for it, otherwise the first tensor.

    Raises:
        ValueError: there is none, or several.
    """
    given = {name: value for name, value in arguments.items() if isinstance(value, Tensor)}
    named = [name for name in (*_SEQUENCES, *_OTHERS) if name in given]
    named = named or list(given)[:1]
    sequence = given[named[0]] if len(named) == 1 else None
    if sequence is None or sequence.dim() < 2 + sequence.is_floating_point():
        raise ValueError(
            f"noise_level has several values a sample, but this forward of {model_name} has no single sequence of "
            "positions, ids (b, l) or features (b, l, d): pass one value per sample."
        )
    return Positions(sequence.shape[0], sequence.shape[1])
