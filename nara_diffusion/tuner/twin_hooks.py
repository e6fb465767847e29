"""Set hooks and attributes on an adapted DiffusionGemma.

Pipelines and `generate` call the encoder and the model's forward directly, so hooks on the root
never run. Instead, hooks on the encoder and on the decoder give C to the layers.

Some instance attributes are also set, until the adapters are unloaded (docs/errors.md):

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
from collections.abc import Callable
from functools import partial
from typing import Any, NoReturn

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from nara_diffusion.noise.canvas_source import CanvasNoise

from .twins import Twins

_NO_FACTOR = r"(?!.*\.lora_)"
"""The start of a pattern that matches no factor of an adapter."""
_TIES, _SAMPLER, _COMPILE = "_tied_weights_keys", "_prepare_sampler", "_compile_functions"
_MASK, _FORMER = "create_diffusion_decoder_attention_mask", "past_key_values"


def hook_twins(
    root: nn.Module,
    twins: Twins,
    source: CanvasNoise,
    begin: Callable[..., None],
    end: Callable[[], None],
) -> tuple[RemovableHandle, ...]:
    """Call `begin` before and `end` after each forward of both twins, and set the attributes above."""
    owner: Any = twins.owner
    patterns = type(owner)._tied_weights_keys.items()
    setattr(owner, _TIES, {_NO_FACTOR + key: _NO_FACTOR + value for key, value in patterns})
    make_mask = getattr(twins.decoder, _MASK)
    if _FORMER not in inspect.signature(make_mask).parameters:
        setattr(twins.decoder, _MASK, partial(_with_former_name, make_mask))
    if hasattr(root, _SAMPLER):
        setattr(root, _SAMPLER, partial(_prepared, source, getattr(root, _SAMPLER)))
        setattr(root, _COMPILE, _refuse_to_compile)
    handles = [
        owner.register_forward_pre_hook(partial(_before_model, source), with_kwargs=True),
        owner.register_forward_hook(partial(_after_model, source), always_call=True),
    ]
    for part in (twins.encoder, twins.decoder):
        begin_part = partial(_before, begin, source, part is twins.encoder)
        handles.append(part.register_forward_pre_hook(begin_part, with_kwargs=True))
        handles.append(part.register_forward_hook(partial(_after, end), always_call=True))
    return tuple(handles)


def unhook_twins(root: nn.Module, twins: Twins, source: CanvasNoise) -> None:
    """Undo `hook_twins`, except for the hooks, which the caller removes through their handles."""
    source.forget()
    vars(twins.owner).pop(_TIES, None)
    vars(twins.decoder).pop(_MASK, None)
    vars(root).pop(_SAMPLER, None)
    vars(root).pop(_COMPILE, None)


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
    begin: Callable[..., None],
    source: CanvasNoise,
    is_clean: bool,
    part: nn.Module,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> None:
    begin(args, kwargs, is_clean)
    source.local.prefix_is_new = is_clean


@torch.compiler.disable(recursive=True)
def _after(end: Callable[[], None], part: nn.Module, args: tuple, output: object) -> None:
    end()
