"""Random numbers of image training: each depends on (seed, stream, index) and on nothing else.

    u ~ U[0, 1),  i = I[⌊u · k⌋],  with I (k,) the noise levels inside of the window, each as often as it is to be drawn
    ε ~ N(0, 1) (c, h, w);  with offset noise  ε + κ δ,  δ ~ N(0, 1) (c, 1, 1)

`stream` names what a number is for, so that two uses never share theirs; `index` is the position in the stream of
samples. So a sample gets the same crop, latent and noise in any process, at any batch size and in any order, and a
resumed run needs no random state. Normal numbers are drawn on the CPU, so they don't depend on the device. Stratified u
are spread evenly over a global batch (`nara_diffusion.utils.random`), and so are the noise levels then. The class image
has its instance's position and another role, so the two meet independent noise.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from diffusers.training_utils import compute_density_for_timestep_sampling
from torch import Tensor

from nara_diffusion.noise.strength_schedule import EVERYTHING, NoiseWindow
from nara_diffusion.utils.random import stratified_uniform

_DRAWS = 2**20


def numpy_generator(seed: int, stream: str, index: int) -> np.random.Generator:
    """NumPy's generator for (seed, stream, index)."""
    return np.random.default_rng((seed, zlib.crc32(stream.encode()), index))


def torch_generator(seed: int, stream: str, index: int) -> torch.Generator:
    """A CPU generator for (seed, stream, index)."""
    state = np.random.SeedSequence((seed, zlib.crc32(stream.encode()), index)).generate_state(
        1, np.uint64
    )
    return torch.Generator().manual_seed(int(state[0]) >> 1)


def seeded_normal(
    shape: Sequence[int], *, seed: int, stream: str, indices: Sequence[int]
) -> Tensor:
    """Standard normal float32 numbers (b, *shape) on the CPU: row i depends on (seed, stream, indices[i]) alone."""
    return torch.stack(
        [torch.randn(*shape, generator=torch_generator(seed, stream, int(i))) for i in indices]
    )


def drawable_levels(
    noise_levels: Tensor, window: NoiseWindow = EVERYTHING, scheme: str = "none", **density: Any
) -> Tensor:
    """I (k,) int64, ascending: the noise levels in `window`, each as often as Diffusers' --weighting_scheme draws it.

    "logit_normal" and "mode" draw unevenly; theirs is the order of a large sample, so that stratified u keep it too.

    Args:
        noise_levels: λ (N,) of the schedule, least noise first.
        scheme: Diffusers' weighting_scheme, which counts its timesteps from the noisy end.
        density: logit_mean, logit_std and mode_scale of `compute_density_for_timestep_sampling`.
    """
    levels = torch.arange(len(noise_levels))
    if scheme in ("logit_normal", "mode"):
        u = compute_density_for_timestep_sampling(
            scheme, _DRAWS, generator=torch.Generator().manual_seed(0), **density
        )
        levels = (
            len(noise_levels)
            - 1
            - (u.double() * len(noise_levels)).long().clamp(0, len(noise_levels) - 1)
        )
    inside = levels[window.contains(noise_levels)[levels]].sort().values
    if len(inside) == 0:
        raise ValueError(
            f"min_noise_level is {window.low} and max_noise_level {window.high}, but of the {len(noise_levels)} noise "
            f"levels of the schedule, from {noise_levels[0]:.4g} to {noise_levels[-1]:.4g}, none lies between: widen "
            "the window."
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
    """The index (b,) int64 of each sample's noise level.

    Args:
        positions: of the samples in the training stream.
        levels: I (k,), of `drawable_levels`.
        stratified, group_size: spread the levels of each `group_size` consecutive positions (a global batch) evenly.
        role: "instance" or "class".
    """
    u = stratified_uniform(
        positions,
        group_size if stratified else 1,
        shift=partial(numpy_generator, seed, f"timestep shift {role}"),
        value=partial(numpy_generator, seed, f"timestep {role}"),
    )
    return levels[(u * len(levels)).long().clamp(max=len(levels) - 1)]


def draw_noise(
    positions: Sequence[int],
    shape: Sequence[int],
    *,
    seed: int,
    offset: float = 0.0,
    role: str = "instance",
) -> Tensor:
    """ε (b, c, h, w) float32 on the CPU, for samples of `shape` (c, h, w); `offset` is κ."""
    noise = seeded_normal(shape, seed=seed, stream=f"noise {role}", indices=positions)
    if offset:
        shifts = seeded_normal(
            (shape[0], 1, 1), seed=seed, stream=f"offset noise {role}", indices=positions
        )
        noise = noise + offset * shifts
    return noise
