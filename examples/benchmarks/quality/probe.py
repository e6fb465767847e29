"""Whether a model's layers see λ without being told: how well one token's input of a layer predicts it, linearly.

    R² = 1 − Σ (λ − λ̂)² / Σ (λ − λ̄)²        on samples that the regression hasn't seen

λ̂ is ridge regression from x, the input of one token to one adapted layer, which is all that LoRA's B A x has. Where R²
is near 1, an update that is a function of x can already differ over λ, and C(λ) tells it nothing new.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

RIDGE = 1e-2  # times the number of samples
HELD_OUT = 3  # every third sample


@dataclass(frozen=True)
class Forward:
    """Attributes: `run` it, which returns λ (b,) of its samples; the `place` (b,) in [0, 1) of the token to look at, or
    below 0 for a sample to leave out."""

    run: Callable[[], Tensor]
    place: Tensor


def tokens_of(module: nn.Module, x: Tensor) -> Tensor:
    """What a layer is given or gives, as (b, l, d): the pixels of a convolution's (b, d, h, w), one token of (b, d)."""
    return x.flatten(2).mT if isinstance(module, _ConvNd) else x.reshape(len(x), -1, x.shape[-1])


def token_at(x: Tensor, place: Tensor) -> Tensor:
    """(b, l, d) → (b, d): the token at `place` · l of each sample."""
    return x[torch.arange(len(x), device=x.device), (place.to(x.device).clamp(min=0) * x.shape[1]).long()]


@contextmanager
def recorded_inputs(modules: Mapping[str, nn.Module], choose: Callable[[Tensor], Tensor]) -> Iterator[Any]:
    """Inside, forwards note {name: [`choose`(tokens (b, l, d) that the module is given), one a forward]}."""
    noted: dict[str, list[Tensor]] = {name: [] for name in modules}

    def hook(name: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        return lambda module, inputs: noted[name].append(choose(tokens_of(module, inputs[0].detach())).float().cpu())

    with ExitStack() as stack:
        for name, module in modules.items():
            handle = module.register_forward_pre_hook(hook(name))
            stack.callback(handle.remove)
        yield noted


def masked_place(masked: Tensor, generator: torch.Generator) -> Tensor:
    """(b, l) bool → (b,) in [0, 1): the middle of one masked token of each row, any of them; −1 where none is."""
    masked = masked.cpu()
    rank = torch.rand(masked.shape, generator=generator).masked_fill(~masked, -1)
    return ((rank.argmax(1) + 0.5) / masked.shape[1]).where(masked.any(1), -1.0)


def r_squared(features: Tensor, levels: Tensor) -> float:
    """Of ridge regression (n, d) → (n,), fitted on two of three samples, on the third."""
    held_out = torch.arange(len(levels)) % HELD_OUT == 0
    x, y = features.double(), levels.double()
    mean, scale = x[~held_out].mean(0), x[~held_out].std(0).clamp(min=1e-8)
    x, y = (x - mean) / scale, y - y[~held_out].mean()
    error = y[held_out] - x[held_out] @ _ridge(x[~held_out], y[~held_out])
    around = y[held_out] - y[held_out].mean()
    return 1 - (error.square().sum() / around.square().sum()).item()


def _ridge(x: Tensor, y: Tensor) -> Tensor:
    """The weights (d,) for centred x (n, d) and y (n,), by x = U S Vᵀ: there may be more features than samples."""
    u, s, vt = torch.linalg.svd(x, full_matrices=False)
    return vt.T @ (s / (s.square() + RIDGE * len(x)) * (u.T @ y))


def probe(modules: Mapping[str, nn.Module], forwards: Iterable[Forward]) -> dict[str, float]:
    """{name of a module: its R²}, from what `modules` are given in `forwards`; see `r_squared`."""
    levels: list[Tensor] = []
    places: list[Tensor] = []
    now: list[Forward] = []
    with recorded_inputs(modules, lambda x: token_at(x, now[-1].place)) as noted:
        for forward in forwards:
            now[:] = [forward]
            levels.append(forward.run().cpu())
            places.append(forward.place)
    told = (torch.cat(places) >= 0).nonzero().flatten()
    order = told[torch.randperm(len(told), generator=torch.Generator().manual_seed(0))]
    known = torch.cat(levels)[order]
    return {name: r_squared(torch.cat(own)[order], known) for name, own in noted.items()}
