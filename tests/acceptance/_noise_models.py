"""Adapted tiny models, and the same models without adapters whose weights are W0 + s·B·C(λ)·A, written by hand.

C comes in float64 from the tensors of an adapter file, so that nothing of the package takes part in the reference.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from peft import get_peft_model, get_peft_model_state_dict
from torch import Tensor, nn

from nara_diffusion import NaraConfig
from tests.helpers.rounding import rounding_of

RANK, ALPHA, SCALE = 4, 6, 0.7
UNET_TARGETS = ["to_q", "to_k", "to_v", "to_out.0", "proj_in", "conv1", "time_emb_proj"]
LAYERS = ["first", "second"]


class TwoLayers(nn.Module):
    """Linear, tanh, Linear: (b, …, 7) → (b, …, 11) → (b, …, 5), with a timestep that it does not read."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(7, 11)
        self.second = nn.Linear(11, 5)

    def forward(self, x: Tensor, timestep: Any = None) -> Tensor:
        return self.second(torch.tanh(self.first(x)))


def config(targets: list[str], **changes: Any) -> NaraConfig:
    small = {"core_scale": SCALE, "core_hidden_dims": (9, 10), "noise_embedding_dim": 8}
    return NaraConfig(r=RANK, lora_alpha=ALPHA, target_modules=targets, **{**small, **changes})


def disturb(model: nn.Module, seed: int = 1, scale: float = 0.4) -> None:
    """Overwrite all that is trained, so that no zero and no identity hides."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data.copy_(scale * torch.randn(parameter.shape, generator=generator))


def adapt(model: nn.Module, targets: list[str], *, scale: float = 0.4, **changes: Any) -> tuple[Any, Stock]:
    """`model` with a disturbed NaRA adapter, by Diffusers' call where it has one, else by PEFT's; and its reference."""
    plain = copy.deepcopy(model)
    with torch.random.fork_rng(devices=[]):  # every call draws the same Fourier frequencies
        torch.manual_seed(7)
        if hasattr(model, "add_adapter") and hasattr(model, "set_adapters"):
            model.requires_grad_(False)
            model.add_adapter(config(targets, **changes))  # type: ignore[operator]
            adapted = model
        else:
            adapted = get_peft_model(model, config(targets, **changes))
    disturb(adapted, scale=scale)
    return adapted.eval(), Stock(plain.eval(), adapted)


class Stock:
    """The model before it was adapted; `at(λ)` gives it the weights of the adapted one at λ."""

    def __init__(self, plain: Any, adapted: nn.Module) -> None:
        self.model, self.adapted = plain, adapted
        self.base = {name: tensor.double().clone() for name, tensor in plain.state_dict().items()}

    def double(self) -> Stock:
        self.model.double()
        return self

    def at(self, level: float) -> Any:
        for name, delta in updates(self.adapted, level).items():
            weight = self.model.get_submodule(name).weight
            weight.data = (self.base[f"{name}.weight"] + delta.view(weight.shape)).to(weight.dtype)
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


def tensors_of(adapted: nn.Module) -> dict[str, Tensor]:
    """What an adapter file holds, without PEFT's prefix."""
    return {
        name.removeprefix("base_model.model."): tensor.detach().double()
        for name, tensor in get_peft_model_state_dict(adapted).items()
    }


def core_at(tensors: dict[str, Tensor], level: float) -> Tensor:
    """C(λ) = I + η F(e(λ)) (r, r)."""
    own = {name.partition("nara_core.shared.")[2]: t for name, t in tensors.items() if "nara_core.shared." in name}
    angle = level * own["embeddings.noise_level.frequencies"]
    h = torch.cat([angle.sin(), angle.cos()])
    for index in range(3):
        h = own[f"layers.{index}.weight"] @ h + own[f"layers.{index}.bias"]
        h = h / (1 + torch.exp(-h)) if index < 2 else h
    return torch.eye(RANK, dtype=torch.float64) + SCALE * h.view(RANK, RANK)


def updates(adapted: nn.Module, level: float) -> dict[str, Tensor]:
    """s · B · C(λ) · A (d_out, d_in · k · k) of each adapted layer."""
    tensors = tensors_of(adapted)
    core = core_at(tensors, level)
    found = {}
    for key, A in tensors.items():
        name, is_a, _ = key.partition(".lora_A.")
        if is_a:
            B = tensors[key.replace(".lora_A.", ".lora_B.")].flatten(1)
            found[name] = ALPHA / RANK * torch.einsum("or,rs,si->oi", B, core, A.flatten(1))
    assert found
    return found


def distance(actual: Tensor, expected: Tensor) -> float:
    """max |actual − expected| / max |expected|."""
    assert actual.shape == expected.shape, (actual.shape, expected.shape)
    actual, expected = actual.detach().double(), expected.detach().double()
    return float((actual - expected).abs().max() / expected.abs().max())


def assert_near(actual: Tensor, expected: Tensor, model: nn.Module) -> None:
    """Up to the rounding of one forward of `model`."""
    error, bound = distance(actual, expected), rounding_of(model)
    assert error < bound, f"off by {error:.2g}, {bound:.2g} is rounding"


def run(model: Any, *args: Any, **kwargs: Any) -> Tensor:
    with torch.no_grad():
        return tensor_of(model(*args, **kwargs))
