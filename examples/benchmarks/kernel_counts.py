"""Kernels that an adapted layer costs beside its base, counted on the CPU: on a device, each is a launch.

A kernel is a call of PyTorch's dispatcher that computes: views, and memory that is only reserved, aren't counted. The
count of a layer is the slope between a chain of four layers and one of eight, less that of the chain without adapters.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from nara_diffusion import NaraConfig, noise_level

METHODS: dict[str, Callable[..., LoraConfig]] = {
    "LoRA": LoraConfig,
    "NaRA": NaraConfig,
    "DoRA": lambda **kwargs: LoraConfig(use_dora=True, **kwargs),
    "NaRA-DoRA": lambda **kwargs: NaraConfig(use_dora=True, **kwargs),
}
WIDTH, RANK, SAMPLES = 512, 16, 2
_FREE = ("aten::empty", "aten::new_empty", "aten::detach", "aten::_unsafe_view", "aten::promote_types", "prim::device")


class Kernels(TorchDispatchMode):
    """Count the kernels that run inside the context, by their names."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = function.name()
        if not function.is_view and not name.startswith(_FREE):
            self.counts[name.removeprefix("aten::")] += 1
        return function(*args, **(kwargs or {}))


def at_levels(model: nn.Module) -> AbstractContextManager[Any]:
    """Give each sample a λ if the model has a NaRA."""
    config = getattr(model, "peft_config", {}).get("default")
    if not isinstance(config, NaraConfig):
        return nullcontext()
    return noise_level(model, torch.linspace(0.1, 0.9, SAMPLES))


def chain(method: str | None, layers: int) -> nn.Module:
    """A chain of bfloat16 layers, adapted by `method`; None leaves them as they are."""
    base = nn.Sequential(*(nn.Linear(WIDTH, WIDTH) for _ in range(layers))).bfloat16().requires_grad_(False)
    if method is None:
        return base
    names = [str(number) for number in range(layers)]
    return get_peft_model(base, METHODS[method](r=RANK, lora_alpha=RANK, target_modules=names))


def of_training(model: nn.Module) -> tuple[Counter[str], Counter[str]]:
    """Kernels of a forward and of its backward."""
    x = torch.randn(SAMPLES, 8, WIDTH, dtype=torch.bfloat16, requires_grad=True)
    forwards = []
    with at_levels(model), torch.autocast("cpu", torch.bfloat16):
        with Kernels() as forward:
            output: Tensor = model.train()(x)
        forwards.append(forward.counts)
    with Kernels() as backward:
        output.sum().backward()
    return forwards[0], backward.counts


def of_inference(model: nn.Module) -> Counter[str]:
    """Kernels of the second of two forwards of the same, frozen weights."""
    x = torch.randn(SAMPLES, 8, WIDTH, dtype=torch.bfloat16)
    model.eval().requires_grad_(False)
    with at_levels(model), torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        model(x)
        with Kernels() as kernels:
            model(x)
    return kernels.counts


def kernels_of_layer(method: str) -> dict[str, dict[str, float]]:
    """{"forward", "backward", "inference": {operation: kernels of one layer beside those of its base}}."""
    runs: dict[str, Callable[[nn.Module], Counter[str]]] = {
        "forward": lambda model: of_training(model)[0],
        "backward": lambda model: of_training(model)[1],
        "inference": of_inference,
    }
    by_method: dict[str, dict[str, float]] = {}
    for name, run in runs.items():
        counts: Counter[str] = Counter()
        for sign, of in ((1, method), (-1, None)):
            for side, layers in ((1, 8), (-1, 4)):
                for operation, count in run(chain(of, layers)).items():
                    counts[operation] += sign * side * count
        by_method[name] = {operation: count / 4 for operation, count in sorted(counts.items()) if count}
    return by_method


def kernels_of_hypernetwork() -> Counter[str]:
    """Kernels of one forward of NaRA's hypernetwork under autocast, with λ of each sample."""
    model = chain("NaRA", 1)
    assert isinstance(model, PeftModel)
    (core,) = model.base_model.model.lora_core.cores["default"].children()
    levels = torch.linspace(0.1, 0.9, SAMPLES)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16), Kernels() as kernels:
        core(levels)
    return kernels.counts
