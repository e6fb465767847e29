"""Which noise level and which noise a training sample meets: a function of (seed, role, position in the stream) alone.

    u ~ U[0, 1),  index = ⌊u · N⌋  into the N noise levels of the schedule, least noise first
    ε ~ N(0, 1) (c, h, w);  with offset noise  ε + κ δ,  δ ~ N(0, 1) (c, 1, 1)

`stratified` spreads the u of a global batch evenly (`nara_diffusion.draws`). The class image of prior preservation has
its instance's position and another role, so the two meet independent noise.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

from torch import Tensor

from nara_diffusion.draws import stratified_uniform
from nara_diffusion.dreambooth.seeding import numpy_generator, seeded_normal


def draw_indices(
    positions: Sequence[int],
    *,
    seed: int,
    levels: int,
    stratified: bool = False,
    group_size: int = 1,
    role: str = "instance",
) -> Tensor:
    """The index (b,) int64 in [0, `levels`) of each sample's noise level.

    Args:
        positions: of the samples in the training stream.
        levels: N, `num_train_timesteps`.
        stratified, group_size: spread the levels of each `group_size` consecutive positions (a global batch) evenly.
        role: "instance" or "class".
    """
    u = stratified_uniform(
        positions,
        group_size if stratified else 1,
        shift=partial(numpy_generator, seed, f"timestep shift {role}"),
        value=partial(numpy_generator, seed, f"timestep {role}"),
    )
    return (u * levels).long()


def draw_noise(
    positions: Sequence[int], shape: Sequence[int], *, seed: int, offset: float = 0.0, role: str = "instance"
) -> Tensor:
    """ε (b, c, h, w) float32 on the CPU, for samples of `shape` (c, h, w); `offset` is κ."""
    noise = seeded_normal(shape, seed=seed, stream=f"noise {role}", indices=positions)
    if offset:
        shifts = seeded_normal((shape[0], 1, 1), seed=seed, stream=f"offset noise {role}", indices=positions)
        noise = noise + offset * shifts
    return noise
