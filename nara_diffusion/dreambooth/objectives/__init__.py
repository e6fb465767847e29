"""What a denoiser learns: from latents x (b, c, h, w) to what it sees, what it should say, how much that counts."""

from .build import build_objective
from .discrete import PREDICTION_TYPES, DiscreteObjective
from .errors import squared_errors, weighted_errors, with_prior
from .flow import FlowObjective
from .identity import IdentityReading
from .preconditioned import PreconditionedObjective, is_edm
from .terms import Corrupted, Objective

__all__ = [
    "PREDICTION_TYPES",
    "Corrupted",
    "DiscreteObjective",
    "FlowObjective",
    "IdentityReading",
    "Objective",
    "PreconditionedObjective",
    "build_objective",
    "is_edm",
    "squared_errors",
    "weighted_errors",
    "with_prior",
]
