"""Random numbers of image training. Each depends only on (seed, stream, index).

    noise level  i = I[⌊u · k⌋],  u ~ U[0, 1)
    noise        ε ~ N(0, 1) (c, h, w);  with offset noise  ε + κ δ,  δ ~ N(0, 1) (c, 1, 1)

I (k,) lists the noise levels inside the window, each as often as it should be drawn. `stream` is
the purpose of a number, so that two purposes never share numbers. `index` is the position in the
stream of samples. A sample therefore gets the same crop, latent and noise in any process, at any
batch size and in any order, and a resumed run needs no random state. Normal numbers are drawn on
the CPU, so they don't depend on the device. Stratified u spread the noise levels evenly over a
global batch (`noise.drawn_levels.stratified_uniform`). A class image has the position of its instance but
a different role, so the two get independent noise.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from functools import partial

import numpy as np
import torch
from diffusers.training_utils import compute_density_for_timestep_sampling
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

from nara_diffusion.noise.level import EVERYTHING, NoiseWindow, stratified_uniform

_DRAWS = 2**20


def numpy_generator(seed: int, stream: str, index: int) -> np.random.Generator:
    """Return NumPy's generator for (seed, stream, index)."""
    return np.random.default_rng((seed, zlib.crc32(stream.encode()), index))


def torch_generator(seed: int, stream: str, index: int) -> torch.Generator:
    """Return torch's CPU generator for (seed, stream, index)."""
    sequence = np.random.SeedSequence((seed, zlib.crc32(stream.encode()), index))
    (state,) = sequence.generate_state(1, np.uint64)
    return torch.Generator().manual_seed(int(state) >> 1)


def seeded_normal(
    shape: Sequence[int], *, seed: int, stream: str, indices: Sequence[int]
) -> Tensor:
    """Return standard normal numbers (b, *shape), float32 on the CPU.

    Row i depends only on (seed, stream, indices[i]).
    """
    generators = [torch_generator(seed, stream, int(index)) for index in indices]
    return randn_tensor((len(generators), *shape), generator=generators)


def drawable_levels(
    noise_levels: Tensor,
    window: NoiseWindow = EVERYTHING,
    scheme: str = "none",
    *,
    logit_mean: float = 0.0,
    logit_std: float = 1.0,
    mode_scale: float = 1.29,
) -> Tensor:
    """Return I (k,) int64, ascending, the indices of the noise levels that can be drawn.

    Each noise level in `window` appears as often as Diffusers' --weighting_scheme would draw it.
    "logit_normal" and "mode" don't draw evenly. For them, I is a large sorted sample, so that
    stratified u have the same distribution.

    Args:
        noise_levels: λ (N,) of the schedule, least noise first.
        scheme: Diffusers' weighting_scheme, which counts timesteps from the noisy end.
        logit_mean, logit_std, mode_scale: as in `compute_density_for_timestep_sampling`.
    """
    count = len(noise_levels)
    levels = torch.arange(count)
    if scheme in ("logit_normal", "mode"):
        fixed = torch.Generator().manual_seed(0)
        u = compute_density_for_timestep_sampling(
            scheme,
            _DRAWS,
            logit_mean=logit_mean,
            logit_std=logit_std,
            mode_scale=mode_scale,
            generator=fixed,
        )
        from_noise = (u.double() * count).long().clamp(0, count - 1)
        levels = count - 1 - from_noise
    inside = levels[window.contains(noise_levels)[levels]].sort().values
    if len(inside) == 0:
        raise ValueError(
            f"The schedule has {count} noise levels from {noise_levels[0]:.4g} to {noise_levels[-1]:.4g}, and none is "
            f"between --min_noise_level {window.low} and --max_noise_level {window.high}: widen the window."
        )
    return inside


def draw_indices(
    positions: Sequence[int],
    levels: Tensor,
    *,
    seed: int,
    stratified: bool = False,
    group_size: int = 1,
    role: str = "instance",
) -> Tensor:
    """Draw the index (b,) int64 of each sample's noise level.

    Args:
        positions: the positions of the samples in the training stream.
        levels: I (k,), from `drawable_levels`.
        stratified: True to spread the levels of each `group_size` consecutive positions evenly.
        group_size: the number of samples in a global batch.
        role: "instance" or "class".
    """
    u = stratified_uniform(
        positions,
        group_size if stratified else 1,
        shift=partial(numpy_generator, seed, f"timestep shift {role}"),
        value=partial(numpy_generator, seed, f"timestep {role}"),
    )
    index = torch.from_numpy(u * len(levels)).long()
    return levels[index.clamp(max=len(levels) - 1)]


def draw_noise(
    positions: Sequence[int],
    shape: Sequence[int],
    *,
    seed: int,
    offset: float = 0.0,
    role: str = "instance",
) -> Tensor:
    """Return noise ε (b, c, h, w), float32 on the CPU, for a `shape` (c, h, w). `offset` is κ."""
    noise = seeded_normal(shape, seed=seed, stream=f"noise {role}", indices=positions)
    if not offset:
        return noise
    stream = f"offset noise {role}"
    shifts = seeded_normal((shape[0], 1, 1), seed=seed, stream=stream, indices=positions)
    return noise + offset * shifts
