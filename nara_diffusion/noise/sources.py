"""The sources of λ: what computes λ from a forward's arguments, and the names of its definitions.

A forward of an adapted model takes λ from the first of these that exists:

1. the context `with noise_level(model, value): …` (`context`);
2. the source that was set with `set_noise_source(model, source)`;
3. the source that was registered with `register_noise_source` for the `noise_convention` of the
   model's first adapter;
4. the default source of the model's class: `timesteps.DenoiserNoise` for classes that receive a timestep
   from Diffusers' pipelines (see the table in `denoisers`), `blocks.BlockNoise` for LLaDA2, and
   `canvas_source.CanvasNoise` for DiffusionGemma.

An adapter is saved with the name of its definition of λ (`noise_convention`). If the model's source
uses another definition, an error is raised. The source in `masked_share`, which reads λ from the
masks in a language model's input, is never a default. Only forwards of the whole model call a
source.
"""

from __future__ import annotations

from typing import Any, Protocol

from torch import Tensor, nn

from .context import core_holders

MASKED_SHARE = "masked_share"
"""The name of λ's definition for masked language models."""

BLOCK_SHARE = "masked_share_of_block"
"""The same, of each block of the answer: clean text has λ = 0 (LLaDA2)."""

CORRUPTED_SHARE = "corrupted_share"
"""The name of λ's definition for DiffusionGemma: the share of a canvas that holds random tokens."""

CONVENTIONS = ("timestep", "flow", "edm", MASKED_SHARE, BLOCK_SHARE, CORRUPTED_SHARE)
"""The names of this package's definitions of λ; `timesteps` has the first three."""


class NoiseSource(Protocol):
    """Compute λ (1,) or (b,) from a forward's arguments; `convention` names the definition of λ."""

    convention: str

    def __call__(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Tensor: ...


registered: dict[str, NoiseSource] = {}
"""Convention → the source that `register_noise_source` has made its default."""


def register_noise_source(source: NoiseSource) -> None:
    """Make `source` the default source of models that have its convention.

        register_noise_source(ShareOfFrames())  # its `convention` is "share_of_frames"
        pipe.load_nara_weights("adapter")  # NaraConfig(noise_convention="share_of_frames")

    A model takes the `noise_convention` of its first adapter. A source is a callable
    (module, args, kwargs) → λ (1,) or (b,) in [0, 1]. The source applies to models that are adapted
    after this call, and takes precedence over the default source of their class. All these models
    share this one object.

    Raises:
        ValueError: the source has no convention, or its convention is already used by this package
            or by another source.
    """
    name = getattr(source, "convention", None)
    if not (isinstance(name, str) and name and callable(source)):
        raise ValueError(
            f"{source!r} is not a source of λ: expected a callable (module, args, kwargs) → λ (1,) or "
            "(b,) with an attribute `convention`, the name of its definition."
        )
    if name in CONVENTIONS:
        raise ValueError(
            f"λ as {name!r} is defined by this package: choose another name for your definition, or "
            "give one model its own source, set_noise_source(model, source)."
        )
    if registered.setdefault(name, source) is not source:
        raise ValueError(
            f"λ as {name!r} has a source already, {registered[name]!r}: choose another name for "
            "your definition."
        )


def set_noise_source(model: nn.Module, source: NoiseSource | None) -> None:
    """Read λ (1,) or (b,) from `source` at each forward of `model` outside `noise_level(…)`.

    Pass None to remove the source.

    Raises:
        ValueError: `model` has no NaRA adapter, or an adapter was trained with another definition
            of λ.
    """
    holders = core_holders(model)
    for holder in holders:
        holder.finder.check_source(source)
    for holder in holders:
        holder.finder.set_source(source)
