"""Say which forwards of an adapted model get C, and what the model refuses.

A model gets C before each forward of its root. A LLaDA2 also gets a block mask there. Pipelines and
`generate` call the encoder and the decoder of a DiffusionGemma directly, so hooks on its root never
run. Instead, hooks on the encoder (at λ = 0) and on the decoder (at λ) give C to the layers.

Some instance attributes of a DiffusionGemma are also set, until the adapters are unloaded
(docs/errors.md):

    model.model._tied_weights_keys      stops `tie_weights()` from tying factors that must be separate
    model._prepare_sampler              shows the sampler of `generate` to the source of λ
    model._compile_functions            refuses a `generate` that compiles, with a static cache
    decoder.create_diffusion_decoder_attention_mask
                                        accepts the cache under the former name, as Diffusers 0.42
                                        passes it; set only if transformers has the new name
"""

from __future__ import annotations

import inspect
import weakref
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any, NoReturn

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from nara_diffusion.noise.blocks import LLADA2, BlockNoise
from nara_diffusion.noise.canvas_source import CanvasNoise
from nara_diffusion.noise.sources import NoiseSource

from .twins import Twins, twins_of

_NO_FACTOR = r"(?!.*\.lora_)"
"""The start of a pattern that matches no factor of an adapter."""
_TIES, _SAMPLER, _COMPILE = "_tied_weights_keys", "_prepare_sampler", "_compile_functions"
_MASK, _FORMER = "create_diffusion_decoder_attention_mask", "past_key_values"


class RootForwards:
    """The forwards of a model that gets C at its root, and refuses nothing.

    Attributes:
        source: the default source of λ for this kind of model, or None.
    """

    source: NoiseSource | None = None

    def __init__(self, root: nn.Module) -> None:
        self.root = root

    def hook(
        self, before: Callable[..., Any], after: Callable[..., None]
    ) -> tuple[RemovableHandle, ...]:
        """Call `before` and `after` around each forward that gets C, and return the hooks' handles.

        Args:
            before: called with (root, args, kwargs), and also with `is_clean=True` if the forward
                runs at λ = 0.
            after: called with the root first.
        """
        return (
            self.root.register_forward_pre_hook(before, with_kwargs=True),
            self.root.register_forward_hook(after, always_call=True),
        )

    def unhook(self) -> None:
        """Undo `hook`, except for the hooks, which the caller removes through their handles."""

    def check_layers(self, names: Iterable[str]) -> None:
        """Raise ValueError if one of the named layers cannot be adapted."""

    def check_merge(self) -> None:
        """Raise ValueError if the adapters cannot be merged into the weights of this model."""

    def check_checkpointing(self, checkpoint: Callable[..., Any]) -> None:
        """Raise ValueError if gradients cannot be computed with this checkpoint function."""


class BlockForwards(RootForwards):
    """The forwards of a LLaDA2, which see its blocks by a mask while LLaDA2Pipeline runs."""

    def __init__(self, root: nn.Module, schedulers: Callable[[], list[Any]]) -> None:
        super().__init__(root)
        self.source: BlockNoise = BlockNoise(schedulers)

    def hook(
        self, before: Callable[..., Any], after: Callable[..., None]
    ) -> tuple[RemovableHandle, ...]:
        handles = super().hook(before, after)
        mask = self.root.register_forward_pre_hook(self.source.with_block_mask, with_kwargs=True)
        return *handles, mask


class TwinForwards(RootForwards):
    """The forwards of a DiffusionGemma: its encoder and its decoder get C, the encoder at λ = 0."""

    def __init__(self, root: nn.Module, twins: Twins, schedulers: Callable[[], list[Any]]) -> None:
        super().__init__(root)
        self.twins = twins
        self.source: CanvasNoise = CanvasNoise(schedulers)

    def hook(
        self, before: Callable[..., Any], after: Callable[..., None]
    ) -> tuple[RemovableHandle, ...]:
        root, source = self.root, self.source
        owner: Any = self.twins.owner
        patterns = type(owner)._tied_weights_keys.items()
        setattr(owner, _TIES, {_NO_FACTOR + key: _NO_FACTOR + value for key, value in patterns})
        make_mask = getattr(self.twins.decoder, _MASK)
        if _FORMER not in inspect.signature(make_mask).parameters:
            setattr(self.twins.decoder, _MASK, partial(_with_former_name, make_mask))
        if hasattr(root, _SAMPLER):
            setattr(root, _SAMPLER, partial(_prepared, source, getattr(root, _SAMPLER)))
            setattr(root, _COMPILE, _refuse_to_compile)
        handles = [
            owner.register_forward_pre_hook(partial(_before_model, source), with_kwargs=True),
            owner.register_forward_hook(partial(_after_model, source), always_call=True),
        ]
        for part in (self.twins.encoder, self.twins.decoder):
            before_part = partial(_before, before, root, source, part is self.twins.encoder)
            handles.append(part.register_forward_pre_hook(before_part, with_kwargs=True))
            handles.append(part.register_forward_hook(partial(after, root), always_call=True))
        return tuple(handles)

    def unhook(self) -> None:
        self.source.forget()
        vars(self.twins.owner).pop(_TIES, None)
        vars(self.twins.decoder).pop(_MASK, None)
        vars(self.root).pop(_SAMPLER, None)
        vars(self.root).pop(_COMPILE, None)

    def check_layers(self, names: Iterable[str]) -> None:
        for name in names:
            if ".router." in name:
                raise ValueError(
                    f"'{name}' is a router, and its update would send tokens to experts that were not trained "
                    "for them. Leave it out with exclude_modules=r'.*router.*'."
                )

    def check_merge(self) -> None:
        raise ValueError(
            f"Adapters of {type(self.root).__name__} cannot be merged or exported as a LoRA: its encoder "
            "(λ = 0) and its decoder share each weight. Keep the adapter as it is."
        )

    def check_checkpointing(self, checkpoint: Callable[..., Any]) -> None:
        if getattr(checkpoint, "keywords", {}).get("use_reentrant"):
            raise ValueError(
                f"{type(self.root).__name__} has reentrant checkpointing, which cannot follow gradients "
                "through the encoder's cache: pass gradient_checkpointing_kwargs="
                '{"use_reentrant": False}.'
            )


def forwards_of(root: nn.Module, schedulers: Callable[[], list[Any]]) -> RootForwards:
    """Return the object that says which forwards of `root` get C.

    Args:
        schedulers: returns the current schedulers of the pipelines that loaded adapters.
    """
    if getattr(getattr(root, "config", None), "model_type", None) == LLADA2:
        return BlockForwards(root, schedulers)
    twins = twins_of(root)
    return RootForwards(root) if twins is None else TwinForwards(root, twins, schedulers)


def _with_former_name(make_mask: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Call `make_mask`, whose argument `cache` may also be given as `past_key_values`."""
    if _FORMER in kwargs:
        kwargs["cache"] = kwargs.pop(_FORMER)
    return make_mask(*args, **kwargs)


def _prepared(source: CanvasNoise, prepare: Callable[[Any], Any], generation_config: Any) -> Any:
    """Return the sampler of a starting `generate` call, and show it to `source`."""
    sampler = prepare(generation_config)
    source.local.sampler, source.local.seen = weakref.ref(sampler), sampler.accepted_token_mask
    return sampler


def _refuse_to_compile(*_: object) -> NoReturn:
    raise ValueError(
        "generate would compile the whole forward for a static cache, where λ can't change: leave the "
        "static cache out, or pass disable_compile=True."
    )


@torch.compiler.disable(recursive=True)
def _before_model(
    source: CanvasNoise, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> None:
    source.local.reads_prompt = bool(args) or kwargs.get("input_ids") is not None


@torch.compiler.disable(recursive=True)
def _after_model(source: CanvasNoise, model: nn.Module, args: tuple, output: object) -> None:
    source.local.reads_prompt = False


@torch.compiler.disable(recursive=True)
def _before(
    before: Callable[..., Any],
    root: nn.Module,
    source: CanvasNoise,
    is_clean: bool,
    part: nn.Module,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> None:
    before(root, args, kwargs, is_clean=is_clean)
    source.local.prefix_is_new = is_clean
