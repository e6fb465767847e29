"""The node "Load NaRA", which computes λ from the sampler's σ at each call of the model.

convention   λ                                                         samplings
timestep     timestep(σ) / num_timesteps, as Diffusers' t / N          discrete ones, also LCM's
flow         σ                                                         flows
edm          σ / (1 + σ)                                               all but flows
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol

import comfy.sd  # type: ignore[import-not-found]
import folder_paths  # type: ignore[import-not-found]
from torch import Tensor, nn

from nara_diffusion.export.host_files import BASES, host_state_dict
from nara_diffusion.loaders.tensor_files import read_tensors

from .adapter import LiveAdapter
from .base_weights import as_in_diffusers, base_weights


class Sampling(Protocol):
    """A `comfy.model_sampling`, which defines the sampling of a model."""

    sigmas: Tensor  # (n,), ascending
    num_timesteps: int  # discrete ones only

    def timestep(self, sigma: Tensor) -> Tensor: ...


class BaseModel(Protocol):
    """The attributes of a `comfy.model_base.BaseModel` that the node reads."""

    diffusion_model: nn.Module
    model_sampling: Sampling


class Patcher(Protocol):
    """The attributes of a `comfy.model_patcher.ModelPatcher` that the node uses."""

    model: BaseModel
    model_options: dict[str, Any]

    def clone(self) -> Patcher: ...

    def get_key_patches(self, filter_prefix: str) -> dict[str, list[Any]]: ...

    def set_model_unet_function_wrapper(self, function: Callable[..., Tensor]) -> None: ...


class LoadNaRA:
    """Add a NaRA to a model, and to CLIP if the adapter has text encoders."""

    RETURN_TYPES = ("MODEL", "CLIP")
    FUNCTION = "load"
    CATEGORY = "loaders"

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {
            "required": {
                "model": ("MODEL",),
                "nara_name": (folder_paths.get_filename_list("loras"),),
                "base": (list(BASES), {"default": "sdxl"}),
                "strength": ("FLOAT", {"default": 1.0, "min": -10.0, "max": 10.0, "step": 0.01}),
            },
            "optional": {"clip": ("CLIP",)},
        }

    def load(
        self, model: Patcher, nara_name: str, base: str, strength: float, clip: object = None
    ) -> tuple[Patcher, object]:
        """Return the patched model and CLIP.

        Raises:
            ValueError: see `LiveAdapter`; modules that the model lacks; text encoders without a
                CLIP to put them on.
        """
        path = folder_paths.get_full_path_or_raise("loras", nara_name)
        denoiser = model.model.diffusion_model

        def base_model() -> nn.Module:
            tensors, _ = read_tensors(Path(path))
            return as_in_diffusers(tensors, base, denoiser, base_weights(model))

        adapter = LiveAdapter(path, base, base_model)
        adapter.check(denoiser)
        if adapter.encoders and clip is None:
            raise ValueError(
                f"'{nara_name}' also adapts {', '.join(adapter.encoders)}. Connect the input clip."
            )
        patched = model.clone()
        previous = model.model_options.get("model_function_wrapper")
        patched.set_model_unet_function_wrapper(wrapper(adapter, patched.model, strength, previous))
        if adapter.encoders:
            tensors = host_state_dict(adapter.encoders, "kohya", base)
            _, clip = comfy.sd.load_lora_for_models(None, clip, tensors, 0.0, strength)
        return patched, clip


def wrapper(
    adapter: LiveAdapter,
    base: BaseModel,
    strength: float,
    previous: Callable[..., Tensor] | None,
) -> Callable[[Callable[..., Tensor], Mapping[str, Any]], Tensor]:
    """Return a replacement for `apply_model` that also calls another node's wrapper, if any."""

    def call(apply_model: Callable[..., Tensor], args: Mapping[str, Any]) -> Tensor:
        level = noise_level(adapter.convention, base.model_sampling, args["timestep"])
        with adapter.applied(base.diffusion_model, level, strength):
            if previous is not None:
                return previous(apply_model, args)
            return apply_model(args["input"], args["timestep"], **args["c"])

    return call


def noise_level(convention: str | None, sampling: Sampling, sigma: Tensor) -> Tensor:
    """Return λ (b,) for ComfyUI's σ (b,).

    Raises:
        ValueError: λ can't be computed from σ, since the sampling of the model differs from the
            adapter's training.
    """
    is_flow = "CONST" in [kind.__name__ for kind in type(sampling).__mro__]
    if convention == "timestep" and not _is_discrete(sampling):
        raise _unlike("timestep / N", sampling, "add the node ModelSamplingDiscrete")
    if convention == "flow" and not is_flow:
        raise _unlike(
            "the σ of a flow", sampling, "add the node ModelSamplingSD3 or ModelSamplingFlux"
        )
    if convention == "edm" and is_flow:
        raise _unlike("σ / (1 + σ)", sampling, "add the node ModelSamplingContinuousEDM")
    if convention == "timestep":
        level = sampling.timestep(sigma).float() / sampling.num_timesteps
    else:
        level = sigma / (1 + sigma) if convention == "edm" else sigma
    return level.clamp(0, 1)


def _is_discrete(sampling: Sampling) -> bool:
    """Return True if `timestep` counts the steps of a schedule, with the last at the largest σ."""
    steps = getattr(sampling, "num_timesteps", None)
    return steps is not None and int(sampling.timestep(sampling.sigmas[-1:])) == steps - 1


def _unlike(definition: str, sampling: Sampling, remedy: str) -> ValueError:
    kinds = ", ".join(kind.__name__ for kind in type(sampling).__bases__)
    return ValueError(
        f"The adapter's λ is {definition}, but the model is sampled by {kinds}, which does not have that "
        f"value. To fix this, {remedy}."
    )
