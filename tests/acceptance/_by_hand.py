"""NaRA by hand in float64, from what the file of an adapter holds, and small models with every kind of layer.

    y = W0 x + b + s B C(λ) A x                                                  NaRA (paper, equation 4)
    y = m ⊙ (W0 + s B C(λ) A) / ‖W0 + s B C(λ) A‖_row x + b                      NaRA-DoRA (appendix M)

A (r, k), C (b, r, r), B (d_out, r), W0 (d_out, k), m (d_out,); s = α / r. The norm is a constant for gradients, as in
DoRA. The reference is the stock layer in float64 with the weight of each sample. Weights, gradients and names come and
go by PEFT's own `get_peft_model_state_dict` and `set_peft_model_state_dict`.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from peft import PeftModel, get_peft_model_state_dict, set_peft_model_state_dict
from torch import Tensor, nn
from torch.func import functional_call
from transformers.pytorch_utils import Conv1D

from nara_diffusion import NaraConfig, register_core
from nara_diffusion.strict import beside_configuration
from tests.helpers.adapted import disturb as disturb
from tests.helpers.adapted import relative_error
from tests.helpers.rounding import rounding

RANK, ALPHA, D_IN, BATCH, IDS = 4, 6, 6, 3, 13
LEVELS = torch.tensor([0.05, 0.5, 0.93])
PREFIX = "base_model.model."


class Scaled(nn.Embedding):
    """As Gemma 3 has it: what is looked up is multiplied by a constant."""

    embed_scale = 3.0

    def forward(self, ids: Tensor) -> Tensor:
        return super().forward(ids) * self.embed_scale


KINDS: dict[str, tuple[Callable[[int], nn.Module], tuple[int, ...]]] = {
    "linear": (lambda width: nn.Linear(D_IN, width), (BATCH, 2, 4, D_IN)),
    "bare": (lambda width: nn.Linear(D_IN, width, bias=False), (BATCH, D_IN)),
    "trained": (lambda width: nn.Linear(D_IN, width), (BATCH, 2, 4, D_IN)),
    "conv1d": (lambda width: nn.Conv1d(D_IN, width, 3, stride=2, padding=1), (BATCH, D_IN, 7)),
    "conv2d": (lambda width: nn.Conv2d(D_IN, width, (3, 2), stride=(2, 1), padding=(1, 0)), (BATCH, D_IN, 5, 4)),
    "conv3d": (lambda width: nn.Conv3d(D_IN, width, (1, 3, 2), bias=False), (BATCH, D_IN, 2, 4, 3)),
    "gpt2": (lambda width: Conv1D(width, D_IN), (BATCH, 4, D_IN)),
    "grouped": (lambda width: nn.Conv2d(D_IN, 2 * width, 3, padding=1, groups=2), (BATCH, D_IN, 4, 3)),
    "embedding": (lambda width: Scaled(IDS, width) if width == 7 else nn.Embedding(IDS, width), (BATCH, 5)),
    "padded_embedding": (lambda width: nn.Embedding(IDS, width, padding_idx=2), (BATCH, 9)),
    "wide": (lambda width: nn.Linear(24, 128 * width), (BATCH, 70, 24)),
    "wide_trained": (lambda width: nn.Linear(24, 128 * width, bias=False), (BATCH, 70, 24)),
}
"""Name of a kind of layer → how to make one of a width, and the shape of its input."""
SMALL = {False: [name for name in KINDS if "wide" not in name and name != "padded_embedding"]}
SMALL[True] = [name for name in SMALL[False] if name not in ("grouped", "embedding")]
"""The kinds of layers below the size from which the package computes some as one function, without DoRA and with it."""


class Kinds(nn.Module):
    """Two layers of each kind, of widths 5 and 7, side by side: {kind: input} → {"one.kind" or "two.kind": output}."""

    def __init__(self, kinds: Iterable[str]) -> None:
        super().__init__()
        self.one = nn.ModuleDict({kind: KINDS[kind][0](5) for kind in kinds})
        self.two = nn.ModuleDict({kind: KINDS[kind][0](7) for kind in kinds})

    def forward(self, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        towers = {"one": self.one, "two": self.two}
        return {f"{tower}.{kind}": layer(inputs[kind]) for tower in towers for kind, layer in towers[tower].items()}

    def inputs(self) -> dict[str, Tensor]:
        """{kind: x}, with gradients where x is no ids."""
        shapes = {kind: KINDS[kind][1] for kind in self.one}
        return {
            kind: torch.randint(IDS, shape) if "embedding" in kind else torch.randn(shape, requires_grad=True)
            for kind, shape in shapes.items()
        }


class Affine(nn.Module):
    """A custom core: C(λ) = I + λ P + λ² Q."""

    def __init__(self, config: NaraConfig, rank: int) -> None:
        super().__init__()
        self.P, self.Q = nn.Parameter(torch.zeros(rank, rank)), nn.Parameter(torch.zeros(rank, rank))

    def forward(self, noise_level: Tensor) -> Tensor:
        powers = torch.stack([noise_level, noise_level.square()], dim=1)  # (b, 2)
        deviation = torch.einsum("bk,krs->brs", powers, torch.stack([self.P, self.Q]))  # which autocast would round
        return torch.eye(len(self.P), device=deviation.device) + deviation


register_core("acceptance affine", Affine)

CORES: dict[str, dict[str, Any]] = {
    "hypernetwork": {},
    "constant": {"core_type": "constant"},
    "identity": {"core_type": "identity"},
    "knots": {"core_type": "knots", "core_knots": 4},
    "rank_mask": {"core_type": "rank_mask", "rank_mask_min": 1},
    "bins": {"core_type": "bins", "core_bins": 2},
    "custom": {"core_type": "acceptance affine"},
}


def tensors_of(model: nn.Module, adapter: str = "default", *, gradients: bool = False) -> dict[str, Tensor]:
    """{name in the file, without PEFT's prefix: tensor}; with `gradients`, those of the parameters that have one."""
    state: dict[str, Tensor] = dict(model.state_dict())
    if gradients:
        grads = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
        state.update(grads)
        of_tensor = {id(gradient) for gradient in grads.values()}
    with beside_configuration():
        selected = get_peft_model_state_dict(model, state, adapter, save_embedding_layers=False)
    return {
        name.removeprefix(PREFIX): tensor
        for name, tensor in selected.items()
        if not gradients or id(tensor) in of_tensor
    }


def write(model: nn.Module, tensors: Mapping[str, Tensor], adapter: str = "default") -> None:
    """Write tensors, by their names in the file, into the adapter; the others stay."""
    prefix = PREFIX if isinstance(model, PeftModel) else ""
    state = {f"{prefix}{name}": tensor for name, tensor in {**tensors_of(model, adapter), **tensors}.items()}
    result = set_peft_model_state_dict(model, state, adapter)
    assert not result.unexpected_keys


def group_of(config: NaraConfig, module: str) -> str:
    """The name, in the file, of the core that a module reads."""
    last = module.rpartition(".")[2]
    return {"global": "shared", "module_type": last, "layer": module.replace(".", "-")}[config.core_sharing]


def core_by_hand(config: NaraConfig, own: Mapping[str, Tensor], level: Tensor, rank: int = RANK) -> Tensor:
    """C (b, r, r) in float64 from the tensors of one core, by their names below its own, at λ (b,).

    Of a core of a larger rank it is the leading block.
    """
    identity, level = torch.eye(rank, dtype=torch.float64), level.double()
    if getattr(config, "core_type", "identity") == "identity":  # as of a LoRA
        return identity.expand(len(level), -1, -1)
    if config.core_type in ("rank_mask", "bins"):
        return torch.stack([torch.diag(torch.tensor(_served(config, rank, x))).double() for x in level.tolist()])
    if config.core_type == "constant":
        return (identity + config.core_scale * own["deviation"][:rank, :rank]).expand(len(level), -1, -1)
    if config.core_type == "acceptance affine":
        P, Q = own["core.P"], own["core.Q"]
        return torch.stack([identity + x * P + x**2 * Q for x in level.tolist()])
    if config.core_type == "knots":
        D, last = own["deviation"][:, :rank, :rank], config.core_knots - 1
        places = [(x * last, min(math.floor(x * last), last - 1)) for x in level.tolist()]
        between = [(k + 1 - place) * D[k] + (place - k) * D[k + 1] for place, k in places]
        return identity + config.core_scale * torch.stack(between)
    h = _embedded(config, own, level)
    for i in range(len(config.core_hidden_dims) + 1):
        h = h * torch.sigmoid(h) if i else h
        h = torch.einsum("bi,oi->bo", h, own[f"layers.{i}.weight"]) + own[f"layers.{i}.bias"]
    largest = math.isqrt(h.shape[1])
    return identity + config.core_scale * h.reshape(-1, largest, largest)[:, :rank, :rank]


def _embedded(config: NaraConfig, own: Mapping[str, Tensor], level: Tensor) -> Tensor:
    if config.noise_embedding == "fourier":
        angle = torch.einsum("b,w->bw", level, own["embeddings.noise_level.frequencies"])
        return torch.cat([angle.sin(), angle.cos()], dim=1)
    if config.noise_embedding == "raw":
        return level[:, None]
    weight, bias = (own[f"embeddings.noise_level.projection.{name}"] for name in ("weight", "bias"))
    h = torch.einsum("b,w->bw", level, weight[:, 0]) + bias
    return h / (1 + torch.exp(-h))


def _served(config: NaraConfig, rank: int, level: float) -> list[bool]:
    """Which of the r directions serve λ: the first ⌊(r − r_min)(1 − λ)⌋ + r_min (T-LoRA), or a block (Multi-LoRA)."""
    if config.core_type == "rank_mask":
        least = config.rank_mask_min or max(1, rank // 2)
        return [i < math.floor((rank - least) * (1 - level)) + least for i in range(rank)]
    bin_ = min(math.floor(level * config.core_bins), config.core_bins - 1)
    return [i // (rank // config.core_bins) == bin_ for i in range(rank)]


# ---------------------------------------------------------------- layers


class ByHand:
    """Every layer of a model before it was adapted, in float64, with leaves for gradients.

    Args:
        base: the model before it was adapted. trained: parts of the names of layers whose own weights are trained.
    """

    def __init__(self, base: nn.Module, trained: str = "no layer") -> None:
        self.layers = {
            name: _dense(copy.deepcopy(layer)).double().requires_grad_(trained in name)
            for name, layer in base.named_modules()
            if "weight" in dict(layer.named_parameters(recurse=False))
        }

    def weights(
        self,
        name: str,
        config: NaraConfig,
        tensors: Mapping[str, Tensor],
        level: Tensor,
        *,
        scaling: float | None = None,
        core: Tensor | None = None,
    ) -> Tensor:
        """W(λ) (b, …) of one layer, in the layout of its weight; `core` (b, r, r) stands in for C(λ)."""
        layer, (A, B) = self.layers[name], (_factor(tensors, name, which) for which in "AB")
        A = A.flatten(1)
        if scaling is None:
            alpha = config.alpha_pattern.get(name, config.lora_alpha)
            scaling = alpha / len(A) ** (0.5 if config.use_rslora else 1)
        B = torch.block_diag(*B.flatten(1).chunk(getattr(layer, "split", 1)))
        if core is None:
            own_prefix = f"nara_core.{group_of(config, name)}." if hasattr(config, "core_type") else "none of a LoRA"
            factors = {n.removeprefix(own_prefix): t for n, t in tensors.items() if n.startswith(own_prefix)}
            core = core_by_hand(config, factors, level, rank=len(A))
        rows = _as_rows(layer, layer.weight) + scaling * torch.einsum("or,brq,qk->bok", B, core, A)
        if config.use_dora:
            norm = rows.detach().square().sum(2, keepdim=True).sqrt()
            rows = tensors[f"{name}.lora_magnitude_vector"].view(-1, 1) * rows / norm
        return rows.mT if _is_turned(layer) else rows.reshape(-1, *layer.weight.shape)

    def output(self, name: str, weights: Tensor, x: Tensor) -> Tensor:
        """The stock layer on x (b, …), with a weight for each sample."""
        layer = self.layers[name]
        x = x.double() if x.is_floating_point() else x
        return torch.cat([functional_call(layer, {"weight": w}, (x[i : i + 1],)) for i, w in enumerate(weights)])

    def outputs(self, config: Any, tensors: Any, inputs: Any, level: Any, **options: Any) -> dict[str, Tensor]:
        """Those of `Kinds`, by the name of the layer; `options` are those of `weights`."""
        by_kind = {}
        for name in self.layers:
            x = inputs[name.split(".")[1]]
            weights = self.weights(name, config, tensors, torch.as_tensor(level).expand(len(x)), **options)
            by_kind[name] = self.output(name, weights, x)
        return by_kind


def leaves(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.detach().double().requires_grad_() for name, tensor in tensors.items()}


def _dense(layer: nn.Module) -> nn.Module:
    """A convolution with groups as one without: C mixes them."""
    groups = getattr(layer, "groups", 1)
    if groups == 1:
        return layer
    dense = nn.Conv2d(layer.in_channels, layer.out_channels, layer.kernel_size, padding=layer.padding)
    blocks = layer.weight.detach().chunk(groups)
    width = blocks[0].shape[1]
    with torch.no_grad():
        dense.weight.zero_()
        for g, block in enumerate(blocks):
            dense.weight[g * len(block) : (g + 1) * len(block), g * width : (g + 1) * width] = block
        dense.bias.copy_(layer.bias)
    dense.split = groups
    return dense


def _factor(tensors: Mapping[str, Tensor], name: str, which: str) -> Tensor:
    embedding = tensors.get(f"{name}.lora_embedding_{which}")
    return tensors[f"{name}.lora_{which}.weight"] if embedding is None else embedding


def _is_turned(layer: nn.Module) -> bool:
    return isinstance(layer, (Conv1D, nn.Embedding))


def _as_rows(layer: nn.Module, weight: Tensor) -> Tensor:
    return weight.T if _is_turned(layer) else weight.flatten(1)


def assert_near(
    actual: Tensor,
    expected: Tensor,
    what: str = "",
    *,
    terms: int = 64,
    sums: int = 12,
    dtype: torch.dtype = torch.float32,
) -> None:
    """Full tensors are equal but for `sums` sums of `terms` products, one after the other, in `dtype`."""
    error, bound = relative_error(actual, expected), rounding(terms, sums, dtype)
    assert error <= bound, f"{what}: off by {error:.3g}, {bound:.3g} is allowed"
