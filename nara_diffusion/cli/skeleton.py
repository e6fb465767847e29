"""A model of the modules that a file adapts and nothing else, with base weights that take no memory.

With it, functions that take an adapted model (`to_lora`, `core_matrix`, …) work on a file. The base weights are zeros,
so what needs those of the base model (a forward, a merge, DoRA's norm) would be wrong.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from nara_diffusion.loaders.file import AdapterPart
from nara_diffusion.loaders.insertion import insert

from .adapter_file import modules_of

ADAPTER = "default"
_CONVOLUTIONS = {3: nn.Conv1d, 4: nn.Conv2d, 5: nn.Conv3d}
"""{dimensions of A: the layer}."""


def skeleton(part: AdapterPart, component: str) -> nn.Module:
    """A model of the adapted modules of a component, with the adapter "default".

    Raises:
        ValueError: the file's tensors don't match its configuration.
    """
    root = nn.Module()
    for name in modules_of(part):
        _set(root, name, _base_layer(part, name))
    insert(root, ADAPTER, part, low_cpu_mem_usage=True)
    return root


def _base_layer(part: AdapterPart, name: str) -> nn.Module:
    if f"{name}.lora_embedding_A" in part.tensors:
        A, B = (part.tensors[f"{name}.lora_embedding_{letter}"] for letter in "AB")
        return _without_memory(nn.Embedding(A.shape[1], B.shape[0], device="meta"))
    A, B = (part.tensors[f"{name}.lora_{letter}.weight"] for letter in "AB")
    if A.dim() == 2:
        return _without_memory(nn.Linear(A.shape[1], B.shape[0], device="meta"))
    groups = A.shape[0] // B.shape[1]
    convolution = _CONVOLUTIONS[A.dim()]
    return _without_memory(convolution(A.shape[1], B.shape[0], tuple(A.shape[2:]), groups=groups, device="meta"))


def _without_memory(layer: nn.Module) -> nn.Module:
    """Replace each weight of `layer` by one zero that is expanded to its shape."""
    for name, parameter in list(layer.named_parameters()):
        setattr(layer, name, nn.Parameter(_zero().expand(parameter.shape), requires_grad=False))
    return layer


def _zero() -> Tensor:
    return torch.zeros(())


def _set(root: nn.Module, name: str, layer: nn.Module) -> None:
    """Set `layer` as the submodule `name` of `root`, and create its parents."""
    *parents, last = name.split(".")
    for parent in parents:
        if parent not in root._modules:
            root.add_module(parent, nn.Module())
        root = root.get_submodule(parent)
    root.add_module(last, layer)
