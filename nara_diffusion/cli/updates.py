"""The updates of an adapter's modules at several λ, in factors, so norms need no matrix (d_out, d_in).

ΔW(λ) = B · M(λ) · A,     M(λ) = s(λ) · α/r · C(λ)          B (d_out, r), M (n, r, r), A (r, d_in)
‖B M A‖ = ‖R_B M R_Aᵀ‖                                      B = Q_B R_B, Aᵀ = Q_A R_A
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from nara_diffusion.export.lora.config import configured_scaling
from nara_diffusion.loaders.format import AdapterPart
from nara_diffusion.noise.signals import NoiseSignals
from nara_diffusion.noise.strength import StrengthSchedule
from nara_diffusion.tuner.config import NaraConfig
from nara_diffusion.tuner.holder.core_set import core_group

from .adapter_file import cores_of, modules_of


@dataclass(frozen=True)
class Update:
    """Attributes: `B` (d_out, r), `M` (n, r, r) and `A` (r, d_in), float64; kernels of convolutions are flattened."""

    B: Tensor
    M: Tensor
    A: Tensor

    @property
    def shape(self) -> tuple[int, int]:
        """(d_out, d_in) of ΔW."""
        return self.B.shape[0], self.A.shape[1]

    def norm(self) -> Tensor:
        """‖ΔW‖ (n,), Frobenius."""
        return _norm(self.B, self.M, self.A)


def norm_of_difference(one: Update, other: Update) -> Tensor:
    """‖ΔW − ΔW'‖ (n,): of [B, B'] · diag(M, −M') · [A; A']."""
    size = (len(one.M), one.M.shape[1] + other.M.shape[1], one.M.shape[1] + other.M.shape[1])
    M = one.M.new_zeros(size)
    rank = one.M.shape[1]
    M[:, :rank, :rank] = one.M
    M[:, rank:, rank:] = -other.M
    return _norm(torch.cat([one.B, other.B], 1), M, torch.cat([one.A, other.A]))


def _norm(B: Tensor, M: Tensor, A: Tensor) -> Tensor:
    left, right = torch.linalg.qr(B).R, torch.linalg.qr(A.T).R
    return (left @ M @ right.T).flatten(1).norm(dim=1)


@torch.no_grad()
def updates_of(part: AdapterPart, levels: Tensor) -> dict[str, Update]:
    """{module: its update at λ (n,)}.

    Raises:
        ValueError: the core reads the mask density too, so ΔW is no function of λ alone.
    """
    config, cores = part.config, cores_of(part)
    if cores.needs_density:
        raise ValueError("the core reads the mask density beside λ, so ΔW can't be compared over λ alone.")
    strength = strength_of(config, levels)
    matrices = {group: cores.matrix(group, NoiseSignals(levels)).expand(len(levels), -1, -1) for group in cores.groups}
    found = {}
    for name, rank in modules_of(part).items():
        C = matrices[core_group(config, name, rank)][:, :rank, :rank]
        A, B = _factors(part, name)
        found[name] = Update(B, strength[:, None, None] * configured_scaling(config, name, rank) * C.double(), A)
    return found


def strength_of(config: NaraConfig, levels: Tensor) -> Tensor:
    """The strength (n,) at λ (n,) that the configuration sets."""
    if config.strength is None:
        return torch.ones_like(levels)
    points: Any = config.strength
    return StrengthSchedule(points).at(levels)


def _factors(part: AdapterPart, name: str) -> tuple[Tensor, Tensor]:
    """A (r, d_in) and B (d_out, r). For a convolution with groups, B is block-diagonal."""
    if f"{name}.lora_embedding_A" in part.tensors:
        A, B = (part.tensors[f"{name}.lora_embedding_{letter}"].double() for letter in "AB")
        return A, B
    A, B = (part.tensors[f"{name}.lora_{letter}.weight"].double().flatten(1) for letter in "AB")
    groups = len(A) // B.shape[1]
    return A, B if groups == 1 else torch.block_diag(*B.chunk(groups))
