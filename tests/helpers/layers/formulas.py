"""Layers of every kind, and what an adapter makes of them, by hand in float64."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

LEVELS = torch.tensor([0.05, 0.5, 0.93])
TIGHT = 2e-6  # float32 against float64: a few dozen additions, each rounded to 6e-8


def linear() -> nn.Module:
    return nn.Linear(7, 5)


def linear_without_bias() -> nn.Module:
    return nn.Linear(7, 5, bias=False)


def conv1d_of_transformers() -> nn.Module:
    layer = Conv1D(5, 7)  # (out, in), weight (7, 5)
    nn.init.normal_(layer.bias)
    return layer


CONVOLUTIONS = {
    "conv1d": (lambda: nn.Conv1d(7, 5, 3, stride=2, padding=1), (3, 7, 9)),
    "conv2d": (lambda: nn.Conv2d(7, 5, 3, padding=1), (3, 7, 6, 5)),
    "conv2d 1x1": (lambda: nn.Conv2d(7, 5, 1, bias=False), (3, 7, 6, 5)),
    "conv3d": (lambda: nn.Conv3d(7, 5, (1, 2, 3), padding=(0, 1, 1)), (3, 7, 4, 3, 5)),
}
LINEARS = {"linear": linear, "no bias": linear_without_bias, "transformers Conv1D": conv1d_of_transformers}


def base_weight(layer: nn.Module) -> Tensor:
    weight = layer.weight.double()
    return weight.T if isinstance(layer, Conv1D) else weight


def linear_by_hand(model: Any, x: Tensor, core: Tensor, dora: bool = False) -> Tensor:
    """y = W0 x + b + s B C A x for each sample, or with DoRA's norm, from materialised matrices."""
    layer = model.base_model.model.layer
    base = layer.get_base_layer()
    W0, s = base_weight(base), model.peft_config["default"].lora_alpha / layer.r["default"]
    A, B = layer.lora_A["default"].weight.double(), layer.lora_B["default"].weight.double()
    W = W0 + s * torch.einsum("or,brq,qi->boi", B, core, A)  # (b, d_out, d_in)
    if dora:
        W = layer.lora_magnitude_vector["default"].weight.double()[:, None] * W / W.norm(dim=2, keepdim=True)
    y = torch.einsum("b...i,boi->b...o", x.double(), W)
    return y if base.bias is None else y + base.bias.double()


def convolution_by_hand(model: Any, x: Tensor, core: Tensor, dora: bool = False) -> Tensor:
    layer = model.base_model.model.layer
    base = layer.get_base_layer()
    s = model.peft_config["default"].lora_alpha / layer.r["default"]
    A, B = layer.lora_A["default"].weight.double(), layer.lora_B["default"].weight.double()
    rows = []
    for sample, C in zip(x.double(), core, strict=True):
        W = base.weight.double() + s * torch.einsum("or,rq,q...->o...", B.flatten(1), C, A)
        if dora:
            norm = W.flatten(1).norm(dim=1)
            dora_scale = layer.lora_magnitude_vector["default"].weight.double().flatten() / norm
            W = W * dora_scale.view(-1, *(1,) * (W.dim() - 1))
        convolve = {3: F.conv1d, 4: F.conv2d, 5: F.conv3d}[W.dim()]
        bias = None if base.bias is None else base.bias.double()
        rows.append(convolve(sample[None], W, bias, base.stride, base.padding))
    return torch.cat(rows)
