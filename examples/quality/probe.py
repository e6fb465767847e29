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

RIDGE = 1e-2  # times the number of samples
HELD_OUT = 3  # every third sample


@dataclass(frozen=True)
class Forward:
    """Attributes: `run` it; the `levels` λ (b,) of its samples; the `place` (b,) in [0, 1) of the token to look at."""

    run: Callable[[], Any]
    levels: Tensor
    place: Tensor


def token_at(x: Tensor, place: Tensor) -> Tensor:
    """(b, l, d) → (b, d): the token at `place` · l of each sample."""
    return x[torch.arange(len(x)), (place * x.shape[1]).long()]


@contextmanager
def recorded_inputs(modules: Mapping[str, nn.Module], choose: Callable[[Tensor], Tensor]) -> Iterator[Any]:
    """Inside, forwards note {name: [`choose`(input of that module), one a forward]}."""
    noted: dict[str, list[Tensor]] = {name: [] for name in modules}

    def hook(name: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        return lambda module, inputs: noted[name].append(choose(inputs[0].detach()).float())

    with ExitStack() as stack:
        for name, module in modules.items():
            handle = module.register_forward_pre_hook(hook(name))
            stack.callback(handle.remove)
        yield noted


def r_squared(features: Tensor, levels: Tensor) -> float:
    """Of ridge regression (n, d) → (n,), fitted on two of three samples, on the third."""
    held_out = torch.arange(len(levels)) % HELD_OUT == 0
    x, y = features.double(), levels.double()
    mean, scale = x[~held_out].mean(0), x[~held_out].std(0).clamp(min=1e-8)
    x = torch.cat([(x - mean) / scale, torch.ones(len(x), 1, dtype=x.dtype)], 1)
    known, wanted = x[~held_out], y[~held_out]
    penalty = RIDGE * len(known) * torch.eye(x.shape[1], dtype=x.dtype)
    penalty[-1, -1] = 0  # of the intercept
    weights = torch.linalg.solve(known.T @ known + penalty, known.T @ wanted)
    error, around = y[held_out] - x[held_out] @ weights, y[held_out] - y[held_out].mean()
    return 1 - (error.square().sum() / around.square().sum()).item()


def probe(modules: Mapping[str, nn.Module], forwards: Iterable[Forward]) -> dict[str, float]:
    """{name of a module: its R²}, from what `modules` are given in `forwards`."""
    levels: list[Tensor] = []
    now: list[Forward] = []
    with recorded_inputs(modules, lambda x: token_at(x, now[-1].place)) as noted, torch.no_grad():
        for forward in forwards:
            now[:] = [forward]
            forward.run()
            levels.append(forward.levels)
    order = torch.randperm(sum(map(len, levels)), generator=torch.Generator().manual_seed(0))
    return {name: r_squared(torch.cat(own)[order], torch.cat(levels)[order]) for name, own in noted.items()}
