"""T-LoRA's three formats with random factors, and their formulas in float64, written from the paper and FACTS alone.

ΔW(t) = α / r · (P diag(μ m(t)) Q − P₀ diag(μ₀ m(t)) Q₀),  m(t) keeps int(((T − t) / T)^a (r − r_min)) + r_min
"""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

BLOCK = "down_blocks.1.attentions.0.transformer_blocks.0"
NAMES = [f"{BLOCK}.attn1.to_q", f"{BLOCK}.attn2.to_k", f"{BLOCK}.ff.net.2", "down_blocks.1.resnets.0.conv_shortcut"]
"""Layers of the UNet: square, wide, tall, and a 1 × 1 convolution."""
MASK = {"min": 1, "exponent": 2.0}
SETTINGS = {"algo": "tlora", "linear_dim": 4, "tlora_min_rank": 1, "tlora_alpha": 2.0}
FILE = "pytorch_lora_weights.safetensors"
SDXL = {"q": "to_q", "k": "to_k", "v": "to_v", "out": "to_out.0"}
FLUX = {**SDXL, "q_proj": "add_q_proj", "k_proj": "add_k_proj", "v_proj": "add_v_proj"}


def drawn(generator: torch.Generator, *shape: int, scale: float = 0.3) -> Tensor:
    return scale * torch.randn(*shape, generator=generator)


def active(t: float, rank: int, least: int = 1, exponent: float = 1.0) -> int:
    return int(((1000 - t) / 1000) ** exponent * (rank - least)) + least


# ---------------------------------------------------------------- files


def saved(folder: Path, tensors: dict[str, Tensor], settings: dict[str, Any] | None = None) -> Path:
    """A folder as SimpleTuner leaves it."""
    folder.mkdir(exist_ok=True)
    save_file(tensors, folder / FILE)
    if settings is not None:
        (folder / "lycoris_config.json").write_text(json.dumps(settings))
    return folder


def lycoris_file(
    model: nn.Module, names: Iterable[str], rank: int = 4, alpha: float = 3.0, prefix: str = "lycoris_", seed: int = 1
) -> dict[str, Tensor]:
    """What `create_lycoris(…, algo="tlora")` saves after training, for these modules."""
    generator, tensors = torch.Generator().manual_seed(seed), {}
    for name in names:
        weight: Any = model.get_submodule(name).weight
        ones = (1,) * (weight.dim() - 2)
        key = prefix + name.replace(".", "_")
        tensors[f"{key}.q_layer.weight"] = drawn(generator, rank, weight.shape[1], *ones)
        tensors[f"{key}.p_layer.weight"] = drawn(generator, weight.shape[0], rank, *ones)
        tensors[f"{key}.lambda_layer"] = drawn(generator, 1, rank)
        tensors[f"{key}.alpha"] = torch.tensor(alpha)
    return tensors


def repository_file(
    model: Any, projections: Mapping[str, str], rank: int = 4, ortho: bool = False, seed: int = 1
) -> dict[str, Tensor]:
    """What T-LoRA's own code saves: for each attention of a UNet or a FLUX, the layers of its processor.

    FLUX's processors have all seven layers in single blocks too, where four of them are never run.
    """
    generator, tensors = torch.Generator().manual_seed(seed), {}
    for processor in model.attn_processors:
        attention = processor.removesuffix(".processor")
        for label, projection in projections.items():
            modules = dict(model.get_submodule(attention).named_modules())
            layer: Any = modules.get(projection, modules["to_q"])
            d_out, d_in = layer.weight.shape
            key = f"{processor}.to_{label}_lora"
            for start in ("base", "") if ortho else ():
                P, Q, values = (f"{start}_p", f"{start}_q", f"{start}_lambda") if start else ("", "", "")
                tensors[f"{key}.{Q or 'q_layer'}.weight"] = drawn(generator, rank, d_in)
                tensors[f"{key}.{P or 'p_layer'}.weight"] = drawn(generator, d_out, rank)
                tensors[f"{key}.{values or 'lambda_layer'}"] = drawn(generator, 1, rank)
            if not ortho:
                tensors[f"{key}.down.weight"] = drawn(generator, rank, d_in)
                tensors[f"{key}.up.weight"] = drawn(generator, d_out, rank)
    return tensors


# ---------------------------------------------------------------- formulas


def start_by_numpy(weight: Tensor, rank: int) -> tuple[Tensor, Tensor, Tensor]:
    """P₀, μ₀, Q₀ by LAPACK in float64."""
    P, values, Q = np.linalg.svd(weight.double().flatten(1).numpy(), full_matrices=False)
    return torch.from_numpy(P[:, :rank]), torch.from_numpy(values[:rank]), torch.from_numpy(Q[:rank])


def start_as_in_lycoris(weight: Tensor, rank: int) -> tuple[Tensor, Tensor, Tensor]:
    P, values, Q = torch.linalg.svd(weight.float().flatten(1), full_matrices=False)
    return P[:, :rank].double(), values[:rank].double(), Q[:rank].double()


def product(P: Tensor, values: Tensor, Q: Tensor, kept: int) -> Tensor:
    P, values, Q = P.double().flatten(1), values.double().flatten(), Q.double().flatten(1)
    return P[:, :kept] @ torch.diag(values[:kept]) @ Q[:kept]


def lycoris_updates(
    model: nn.Module,
    tensors: Mapping[str, Tensor],
    kept: int,
    start: Callable[[Tensor, int], tuple[Tensor, Tensor, Tensor]] = start_by_numpy,
) -> dict[str, Tensor]:
    """{module: ΔW} with the first `kept` directions, for tensors of `lycoris_file`."""
    updates = {}
    for name, module in model.named_modules():
        key = "lycoris_" + name.replace(".", "_")
        if f"{key}.lambda_layer" not in tensors:
            continue
        values, weight = tensors[f"{key}.lambda_layer"], module.weight.detach()
        rank = values.shape[1]
        P0, values0, Q0 = start(weight, rank)
        update = product(tensors[f"{key}.p_layer.weight"], values, tensors[f"{key}.q_layer.weight"], kept)
        update -= product(P0, values0, Q0[:, : weight.shape[1]], kept)
        updates[name] = float(tensors[f"{key}.alpha"]) / rank * update
    return updates


def repository_updates(
    tensors: Mapping[str, Tensor], projections: Mapping[str, str], kept: int, modules: Iterable[str]
) -> dict[str, Tensor]:
    """{module: ΔW} with the first `kept` directions, for tensors of `repository_file`."""
    updates = {}
    for layer in {re.sub(r"_lora\..*", "", key) for key in tensors}:
        attention, _, label = layer.partition(".processor.to_")
        name, key = f"{attention}.{projections[label]}", f"{layer}_lora."
        if name not in modules:
            continue
        if f"{key}down.weight" in tensors:
            A, B = tensors[f"{key}down.weight"], tensors[f"{key}up.weight"]
            updates[name] = product(B, torch.ones(len(A)), A, kept)
        else:
            P, values, Q = (tensors[key + end] for end in ("p_layer.weight", "lambda_layer", "q_layer.weight"))
            P0, values0, Q0 = (tensors[key + end] for end in ("base_p.weight", "base_lambda", "base_q.weight"))
            updates[name] = product(P, values, Q, kept) - product(P0, values0, Q0, kept)
    return updates


def in_float64(model: Any, updates: Mapping[str, Tensor]) -> Any:
    """A copy of `model` in float64 with ΔW added to its weights."""
    changed = copy.deepcopy(model).double()
    for name, update in updates.items():
        weight = changed.get_submodule(name).weight
        weight.data += update.reshape(weight.shape)
    return changed
