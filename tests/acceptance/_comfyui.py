"""Small stand-ins for what the node uses of ComfyUI, after its public interface, and modules by its models' names.

ComfyUI (a125cd84): comfy/model_patcher.py, model_sampling.py, samplers.py, sd.py; folder_paths.py. The names of its
models' modules are those of the exports, which tests/export and test_files_export.py compare with other programs'.
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from nara_diffusion.export.original_names import parts_of


class Discrete:
    """ModelSamplingDiscrete: the 1000 sigmas of SD's schedule; a timestep is that of the nearest log σ."""

    num_timesteps = 1000

    def __init__(self) -> None:
        betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
        alphas = (1 - betas).cumprod(0)
        self.sigmas = ((1 - alphas) / alphas).sqrt().float()

    def timestep(self, sigma: Tensor) -> Tensor:
        return (sigma.log()[None] - self.sigmas.log()[:, None]).abs().argmin(dim=0).view(sigma.shape)


class Flow:
    """ModelSamplingFlux."""

    def timestep(self, sigma: Tensor) -> Tensor:
        return sigma


class Distilled(Discrete):
    """ModelSamplingDiscreteDistilled, that of LCM: 50 of the 1000 sigmas."""

    def __init__(self) -> None:
        super().__init__()
        self.sigmas = self.sigmas[19::20]

    def timestep(self, sigma: Tensor) -> Tensor:
        return 20 * super().timestep(sigma) + 19


class DiscreteEDM(Discrete):
    """ModelSamplingDiscreteEDM: a schedule, but no timesteps of it."""

    def timestep(self, sigma: Tensor) -> Tensor:
        return 0.25 * sigma.log()


class EPS:
    """A sampling of what predicts ε."""


class V_PREDICTION(EPS):
    """A sampling of what predicts v."""


class CONST:
    """A sampling of rectified flows."""


class Patcher:
    """comfy.model_patcher.ModelPatcher: clones share the model, and have options of their own."""

    def __init__(self, diffusion_model: nn.Module, sampling: Any, apply_model: Callable[..., Tensor]) -> None:
        self.model = SimpleNamespace(diffusion_model=diffusion_model, model_sampling=sampling, apply_model=apply_model)
        self.model_options: dict[str, Any] = {"transformer_options": {}}

    def clone(self) -> Patcher:
        other = copy.copy(self)
        other.model_options = copy.copy(self.model_options)
        return other

    def get_key_patches(self, filter_prefix: str) -> dict[str, list[Any]]:
        """Each weight as it was before any patch, and patches."""
        weights = self.model.diffusion_model.state_dict(prefix="diffusion_model.")
        return {key: [(weight, None)] for key, weight in weights.items() if key.startswith(filter_prefix)}

    def set_model_unet_function_wrapper(self, function: Any) -> None:
        self.model_options["model_function_wrapper"] = function

    def sample(self, x: Tensor, sigma: Tensor, **c: Any) -> Tensor:
        """One call of the model, as comfy.samplers makes it."""
        function = self.model_options.get("model_function_wrapper")
        if function is None:
            return self.model.apply_model(x, sigma, **c)
        return function(self.model.apply_model, {"input": x, "timestep": sigma, "c": c, "cond_or_uncond": [0]})


def named(modules: dict[str, nn.Module]) -> nn.Module:
    """A diffusion_model of ComfyUI's: modules under its names."""
    root = nn.Module()
    for name, module in modules.items():
        place, (*parents, last) = root, name.split(".")
        for parent in parents:
            place = place._modules.setdefault(parent, nn.Module())  # type: ignore[assignment]
        place.add_module(last, module)
    return root


def named_as_stability_does(unet: nn.Module) -> nn.Module:
    """The layers of a UNet of Diffusers, two ResNet blocks a level, under Stability's names."""
    layers = {name: module for name, module in unet.named_modules() if isinstance(module, (nn.Linear, nn.Conv2d))}
    names = [name for name in layers if not name.startswith("add_embedding")]
    return named({other: layers[name] for other, (name,) in parts_of(names, "sdxl").items()})


@contextmanager
def comfyui(loras: Path) -> Iterator[SimpleNamespace]:
    """Inside, `comfyui` imports beside stubs: `.node()` is a new node, `.clips` what was loaded into CLIPs.

    Args:
        loras: ComfyUI/models/loras.
    """
    clips: list[tuple[Any, dict[str, Tensor], float]] = []

    def load_lora_for_models(model: Any, clip: Any, lora: Any, strength_model: float, strength_clip: float) -> Any:
        clips.append((clip, lora, strength_clip))
        return model, f"{clip} with a LoRA"

    stubs = {name: ModuleType(name) for name in ("folder_paths", "comfy", "comfy.sd")}
    vars(stubs["folder_paths"]).update(
        get_filename_list=lambda kind: sorted(path.name for path in loras.iterdir()),
        get_full_path_or_raise=lambda kind, name: str(loras / name),
    )
    vars(stubs["comfy.sd"]).update(load_lora_for_models=load_lora_for_models)
    vars(stubs["comfy"]).update(sd=stubs["comfy.sd"])

    def ours() -> list[str]:
        return [name for name in sys.modules if name.partition(".")[0] == "comfyui"]

    modules = {name: sys.modules.pop(name) for name in ours()}
    sys.modules.update(stubs)
    try:
        import comfyui as package

        (kind,) = package.NODE_CLASS_MAPPINGS.values()
        yield SimpleNamespace(node=kind, load=lambda *given: getattr(kind(), kind.FUNCTION)(*given), clips=clips)
    finally:
        for name in [*ours(), *stubs]:
            del sys.modules[name]
        sys.modules.update(modules)
