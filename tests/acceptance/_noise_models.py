"""Adapted tiny models, and the same models without adapters whose weights are W0 + s·B·C(λ)·A, written by hand."""

from __future__ import annotations

import copy
from typing import Any

import torch
from peft import get_peft_model
from torch import Tensor, nn

from tests.acceptance._by_hand import ByHand, leaves, tensors_of
from tests.helpers.adapted import TwoLayers, disturb, nara_config
from tests.helpers.adapted import relative_error as distance
from tests.helpers.rounding import assert_near

__all__ = ["LAYERS", "UNET_TARGETS", "Stock", "TwoLayers", "adapt", "assert_near", "distance", "run", "tensor_of"]
UNET_TARGETS = ["to_q", "to_k", "to_v", "to_out.0", "proj_in", "conv1", "time_emb_proj"]
LAYERS = ["first", "second"]


def adapt(model: Any, targets: list[str], *, scale: float = 0.4, **changes: Any) -> tuple[Any, Stock]:
    """`model` with a disturbed NaRA adapter, by Diffusers' call where it has one, else by PEFT's; and its reference."""
    plain, config = copy.deepcopy(model), nara_config(target_modules=targets, **{"fourier_scale": 16.0, **changes})
    with torch.random.fork_rng(devices=[]):  # every call draws the same Fourier frequencies
        torch.manual_seed(7)
        if hasattr(model, "add_adapter") and hasattr(model, "set_adapters"):
            model.requires_grad_(False)
            model.add_adapter(config)
        else:
            model = get_peft_model(model, config)
    disturb(model, scale=scale)
    return model.eval(), Stock(plain.eval(), model)


class Stock:
    """The model before it was adapted; `at(λ)` gives it the weights of the adapted one at λ."""

    def __init__(self, plain: Any, adapted: nn.Module) -> None:
        self.model, self.adapted, self.base = plain, adapted, ByHand(plain)

    def double(self) -> Any:
        self.model.double()
        return self

    def at(self, level: float) -> Any:
        tensors: dict[str, Tensor] = leaves(tensors_of(self.adapted))
        config: Any = self.adapted.peft_config["default"]  # type: ignore[index]
        for name in {name.partition(".lora_A.")[0] for name in tensors if ".lora_A." in name}:
            weight = self.model.get_submodule(name).weight
            weight.data = self.base.weights(name, config, tensors, torch.tensor([level])).detach()[0].to(weight.dtype)
        return self.model

    def each(self, levels: Any, *batches: Tensor) -> Tensor:
        """One sample after the other, each at its own λ."""
        rows = range(len(batches[0]))
        levels = torch.as_tensor(levels, dtype=torch.float64).expand(len(rows)).tolist()
        with torch.no_grad():
            return torch.cat([tensor_of(self.at(levels[i])(*(batch[i : i + 1] for batch in batches))) for i in rows])


def tensor_of(output: Any) -> Tensor:
    """The prediction of a denoiser, the logits of a language model."""
    for name in ("sample", "logits"):
        output = getattr(output, name, output)
    return output[0] if isinstance(output, tuple) else output


def run(model: Any, *args: Any, **kwargs: Any) -> Tensor:
    with torch.no_grad():
        return tensor_of(model(*args, **kwargs))
