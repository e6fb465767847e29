"""What the node uses of ComfyUI, after its public interface: a model patcher, a base model, its sampling, folders."""

from __future__ import annotations

import copy
import sys
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn


class Sampling:
    """ModelSamplingDiscrete: 1000 sigmas of SD's schedule; t is that of the nearest log σ, as in ComfyUI."""

    num_timesteps = 1000

    def __init__(self) -> None:
        betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
        alphas = (1 - betas).cumprod(0)
        self.sigmas = ((1 - alphas) / alphas).sqrt().float()

    def timestep(self, sigma: Tensor) -> Tensor:
        distances = sigma.log()[None] - self.sigmas.log()[:, None]
        return distances.abs().argmin(dim=0).view(sigma.shape)


class FlowSampling:
    """ModelSamplingFlux."""

    def timestep(self, sigma: Tensor) -> Tensor:
        return sigma


class EPS:
    """comfy.model_sampling's class of models that predict ε; a model's sampling is of such a class, too."""


class V_PREDICTION(EPS):
    """The same of v."""


class CONST:
    """The same of rectified flows."""


class Patcher:
    """comfy.model_patcher.ModelPatcher: clones share the model, and have options of their own."""

    def __init__(self, model: Any) -> None:
        self.model = model
        self.model_options: dict[str, Any] = {"transformer_options": {}}

    def clone(self) -> Patcher:
        other = Patcher(self.model)
        other.model_options = copy.copy(self.model_options)
        return other

    def set_model_unet_function_wrapper(self, function: Any) -> None:
        self.model_options["model_function_wrapper"] = function

    def sample(self, x: Tensor, sigma: Tensor, **c: Any) -> Tensor:
        """One call of the model, as comfy.samplers makes it."""
        function = self.model_options.get("model_function_wrapper")
        if function is None:
            return self.model.apply_model(x, sigma, **c)
        return function(self.model.apply_model, {"input": x, "timestep": sigma, "c": c, "cond_or_uncond": [0]})


class Named(nn.Module):
    """ComfyUI's diffusion_model: modules by the names of the original code, that of Diffusers beneath."""

    def __init__(self, modules: dict[str, nn.Module]) -> None:
        super().__init__()
        for name, module in modules.items():
            *parents, last = name.split(".")
            place: nn.Module = self
            for parent in parents:
                if parent not in place._modules:
                    place.add_module(parent, nn.Module())
                place = place._modules[parent]  # type: ignore[assignment]
            place.add_module(last, module)


@pytest.fixture
def comfyui(monkeypatch, tmp_path):
    """The node's package, beside stubs; `.folder` is ComfyUI/models/loras, `.loaded` what went to CLIPs."""
    loaded: list[Any] = []

    def load_lora_for_models(model, clip, lora, strength_model, strength_clip):
        loaded.append((clip, lora, strength_clip))
        return model, f"{clip} with a LoRA"

    folders = ModuleType("folder_paths")
    folders.get_filename_list = lambda kind: sorted(path.name for path in tmp_path.iterdir())  # type: ignore[attr-defined]
    folders.get_full_path_or_raise = lambda kind, name: str(tmp_path / name)  # type: ignore[attr-defined]
    comfy, sd = ModuleType("comfy"), ModuleType("comfy.sd")
    sd.load_lora_for_models = load_lora_for_models  # type: ignore[attr-defined]
    comfy.sd = sd  # type: ignore[attr-defined]
    for name, module in (("folder_paths", folders), ("comfy", comfy), ("comfy.sd", sd)):
        monkeypatch.setitem(sys.modules, name, module)
    for name in [name for name in sys.modules if name == "comfyui" or name.startswith("comfyui.")]:
        monkeypatch.delitem(sys.modules, name)
    import comfyui as package

    return SimpleNamespace(package=package, node=package.node, adapter=package.adapter, folder=tmp_path, loaded=loaded)
