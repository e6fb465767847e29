"""Which noise level and which noise a training sample meets: a function of (seed, role, position in the stream) alone.

    u ~ U[0, 1),  index = ⌊u · N⌋  into the N noise levels of the schedule, least noise first
    ε ~ N(0, 1) (c, h, w);  with offset noise  ε + κ δ,  δ ~ N(0, 1) (c, 1, 1)

With a window of noise levels, N are those inside of it, or those outside (`nara_diffusion.noise.window`).
With a bias, the index is the u-quantile of its weights (`timestep_bias`), so that it is stratified where u is.
`stratified` spreads the u of a global batch evenly (`nara_diffusion.utils.random`). The class image of prior
preservation has its instance's position and another role, so the two meet independent noise.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor

from nara_diffusion.dreambooth.seeding import numpy_generator, seeded_normal
from nara_diffusion.noise.window import NoiseWindow
from nara_diffusion.utils.random import stratified_uniform


class WindowedSchedule:
    """The noise levels of a schedule that lie inside of a window, and those outside where the base is held there.

    Args:
        noise_levels: λ (N,) of the schedule, least noise first.
        window: of λ.
        weights: (N,), how often each level is drawn, up to a factor; None draws all alike.

    Raises:
        ValueError: none of them lies inside; or outside, where the base is to be held; `weights` are the same for all
            that are drawn.
    """

    def __init__(self, noise_levels: Tensor, window: NoiseWindow, weights: Tensor | None = None) -> None:
        self.window, self.weights = window, weights
        inside = window.contains(noise_levels)
        self.inside, self.outside = inside.nonzero()[:, 0], (~inside).nonzero()[:, 0]  # (k,), (N − k,)
        given = f"min_noise_level is {window.low} and max_noise_level {window.high}"
        span = f"of the {len(noise_levels)} noise levels of the schedule, from {noise_levels[0]:.4g} to "
        span += f"{noise_levels[-1]:.4g},"
        if len(self.inside) == 0:
            raise ValueError(f"{given}, but {span} none lies between: widen the window.")
        if window.hold_weight is not None and len(self.outside) == 0:
            raise ValueError(
                f"{given}, but {span} none lies outside of them for hold_base_outside: leave it out, or narrow the "
                "window."
            )
        drawn = weights if weights is None or window.hold_weight is not None else weights[self.inside]
        if drawn is not None and len(drawn.unique()) == 1:
            raise ValueError(
                f"{given}, and timestep_bias_strategy draws all noise levels between them alike: choose some of those, "
                "or leave it out."
            )

    def indices(self, u: Tensor) -> Tensor:
        """The indices (b,) into the schedule that u (b,) in [0, 1) stand for."""
        outside = self._mass(self.outside)
        v, is_outside = self.window.divide(u, outside / (outside + self._mass(self.inside)))
        chosen = self._quantile(self.inside, v)
        if is_outside.any():
            chosen = torch.where(is_outside, self._quantile(self.outside, v), chosen)
        return chosen

    def _mass(self, members: Tensor) -> float:
        return len(members) if self.weights is None else self.weights[members].sum().item()

    def _quantile(self, members: Tensor, v: Tensor) -> Tensor:
        """The level (b,) among `members` (k,) below which a share v (b,) of their weight lies."""
        if self.weights is None:
            return members[(v * len(members)).long()]
        cumulative = self.weights[members].cumsum(0)
        places = torch.searchsorted(cumulative / cumulative[-1], v, right=True)
        return members[places.clamp(max=len(members) - 1)]  # v may round up to 1


def draw_indices(
    positions: Sequence[int],
    *,
    seed: int,
    levels: int,
    stratified: bool = False,
    group_size: int = 1,
    role: str = "instance",
    windowed: WindowedSchedule | None = None,
) -> Tensor:
    """The index (b,) int64 in [0, `levels`) of each sample's noise level.

    Args:
        positions: of the samples in the training stream.
        levels: N, `num_train_timesteps`.
        stratified, group_size: spread the levels of each `group_size` consecutive positions (a global batch) evenly.
        role: "instance" or "class".
        windowed: the same schedule with a window; None draws from all of it.
    """
    u = stratified_uniform(
        positions,
        group_size if stratified else 1,
        shift=partial(numpy_generator, seed, f"timestep shift {role}"),
        value=partial(numpy_generator, seed, f"timestep {role}"),
    )
    return (u * levels).long() if windowed is None else windowed.indices(u)


def draw_noise(
    positions: Sequence[int], shape: Sequence[int], *, seed: int, offset: float = 0.0, role: str = "instance"
) -> Tensor:
    """ε (b, c, h, w) float32 on the CPU, for samples of `shape` (c, h, w); `offset` is κ."""
    noise = seeded_normal(shape, seed=seed, stream=f"noise {role}", indices=positions)
    if offset:
        shifts = seeded_normal((shape[0], 1, 1), seed=seed, stream=f"offset noise {role}", indices=positions)
        noise = noise + offset * shifts
    return noise
