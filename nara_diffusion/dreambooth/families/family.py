"""What the script has to know of a family of image models; `table` lists them, and each has a file in `unet` or `flow`.

    prompts → encode → embeddings, a tuple of (b, …)
    x_λ (b, c, h, w), timestep (b,), embeddings → call → prediction (b, c, h, w)

x_λ, the timestep and the prediction are those of the objective: of a rectified flow x_σ = (1 − σ) x + σ ε, N σ and
ε − x. What a denoiser takes in their place (σ, 1 − σ, tokens in place of a grid, the negative) stands in `call` alone.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

Embeddings = tuple[Tensor, ...]
TRANSFORMER_TARGETS = ("to_q", "to_k", "to_v", "to_out.0")


@dataclass(frozen=True)
class Conditions:
    """What a run, or its pipeline, settles of how prompts are encoded and the denoiser is called.

    Attributes:
        max_sequence_length: tokens of a prompt, for families whose text encoders read more or less, or which read it in
            chunks; None for what CLIP has places for.
        guidance: what a denoiser with distilled guidance is told; None for others.
        clip_skip: as the pipelines have it, layers of CLIP that are left out at its end; None takes their default.
        timestep_of_tokens: whether the denoiser takes one timestep for each token.
    """

    max_sequence_length: int | None = None
    guidance: float | None = None
    clip_skip: int | None = None
    timestep_of_tokens: bool = False


@dataclass(frozen=True)
class Call:
    """One call of a denoiser, in the objective's terms.

    Attributes:
        sample: (b, c, h, w), x_λ in the denoiser's dtype.
        timestep: (b,).
        embeddings: of the prompts, those that are no masks in the denoiser's dtype.
        time_ids: (b, 6), (H, W, top, left, h, w) of `Crop`.
        conditions: of the run.
    """

    sample: Tensor
    timestep: Tensor
    embeddings: Embeddings
    time_ids: Tensor
    conditions: Conditions


def _same(pipe: Any, family: Family) -> Family:
    return family


def _first_dtype(denoiser: nn.Module) -> torch.dtype:
    return next(denoiser.parameters()).dtype  # `denoiser.dtype` walks over all modules


def _nothing(call: dict[str, Any], count: int) -> dict[str, Any]:
    return call


@dataclass(frozen=True)
class Family:
    """See the module's docstring.

    Attributes:
        name: for tables and tags.
        title: for messages.
        pipelines: the classes in `model_index.json`.
        parts: names of the embeddings.
        encoder: (pipe, prompts, conditions) → embeddings. Of `pipe` it reads tokenizers and text encoders, which may be
            adapted ones if they are in `text_encoders`.
        caller: (denoiser, `Call`) → the prediction.
        divisor: (pipe) → what sides of images are multiples of.
        denoiser: its name in the pipeline.
        text_encoders: names of those that can be trained too.
        tokenizers: of these; in other families the one that tells how many tokens a prompt has.
        in_chunks: whether CLIP reads prompts of more than its 77 tokens in chunks (`long_prompts`).
        cut_short: those of them whose last layer isn't read.
        clips: text encoders of which layers can be left out at their end.
        no_clip_skip: why there are none, for messages.
        targets: modules that are adapted by default.
        defaults: other arguments that differ from the script's own defaults.
        is_flow: whether it is a rectified flow, as its scheduler says too.
        conditions: see there.
        fit: (pipe, family) → the family with what this pipeline settles; raises ValueError for one that can't be
            trained.
        sampling: (arguments of a call, number of images) → what the pipeline's call takes for them.
        images_of: from the call's output to images (b, h, w, 3).
        picked: the same of one image in code, for model cards.
        dtype_of: (denoiser) → what it takes samples and embeddings in.
        loading: further arguments of `from_pretrained`.
        tags: of model cards.
    """

    name: str
    title: str
    pipelines: tuple[str, ...]
    parts: tuple[str, ...]
    encoder: Callable[[Any, list[str], Conditions], Embeddings]
    caller: Callable[[Any, Call], Tensor]
    divisor: Callable[[Any], int]
    denoiser: str = "transformer"
    text_encoders: tuple[str, ...] = ()
    tokenizers: tuple[str, ...] = ()
    in_chunks: bool = False
    cut_short: tuple[str, ...] = ()
    clips: tuple[str, ...] = ()
    no_clip_skip: str = "reads no CLIP of which layers could be left out"
    targets: tuple[str, ...] = TRANSFORMER_TARGETS
    defaults: Mapping[str, Any] = field(default_factory=dict)
    is_flow: bool = True
    conditions: Conditions = Conditions()
    fit: Callable[[Any, Family], Family] = _same
    sampling: Callable[[dict[str, Any], int], dict[str, Any]] = _nothing
    images_of: Callable[[Any], Any] = lambda output: output.images
    picked: str = ".images[0]"
    dtype_of: Callable[[Any], torch.dtype] = _first_dtype
    loading: Mapping[str, Any] = field(default_factory=dict)
    tags: tuple[str, ...] = ()

    def with_conditions(self, **changes: Any) -> Family:
        """The same with those `Conditions` that aren't None."""
        given = {name: value for name, value in changes.items() if value is not None}
        return replace(self, conditions=replace(self.conditions, **given))

    @property
    def sample_call(self) -> dict[str, Any]:
        """Arguments by which `render` has a pipeline encode prompts under the same conditions."""
        told = {name: getattr(self.conditions, name) for name in ("max_sequence_length", "clip_skip")}
        return {name: value for name, value in told.items() if value is not None}

    def encode(self, pipe: Any, prompts: Sequence[str]) -> Embeddings:
        """Of b prompts, each (b, …)."""
        return self.encoder(pipe, list(prompts), self.conditions)

    def predict(
        self, denoiser: nn.Module, sample: Tensor, timestep: Tensor, time_ids: Tensor, embeddings: Embeddings
    ) -> Tensor:
        """(b, c, h, w), what the objective compares with its target; shapes as in `Call`."""
        dtype = self.dtype_of(denoiser)
        cast = tuple(tensor.to(dtype) if tensor.is_floating_point() else tensor for tensor in embeddings)
        return self.caller(denoiser, Call(sample.to(dtype), timestep, cast, time_ids, self.conditions))


def stack_padded(tensors: Sequence[Tensor]) -> Tensor:
    """(b, l, …) of tensors (l_i, …), zeros after the shorter ones."""
    longest = max(len(tensor) for tensor in tensors)
    if all(len(tensor) == longest for tensor in tensors):
        return torch.stack(list(tensors))
    return torch.stack([torch.cat([t, t.new_zeros(longest - len(t), *t.shape[1:])]) for t in tensors])
