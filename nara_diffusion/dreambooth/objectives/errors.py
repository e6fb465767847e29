"""The loss of each sample, from a prediction."""

from __future__ import annotations

from torch import Tensor

from .distances import SQUARED, Distance
from .terms import Corrupted


def squared_errors(prediction: Tensor, batch: Corrupted) -> Tensor:
    """The weighted mean squared error of each sample, (b,) float32."""
    return weighted_errors(prediction, batch, SQUARED)


def weighted_errors(prediction: Tensor, batch: Corrupted, distance: Distance) -> Tensor:
    """The weighted mean distance of each sample's prediction from its target, (b,) float32.

    Min-SNR's and EDM's weights, which are made for squares, multiply other distances as they are.
    """
    errors = distance(prediction.float() - batch.target.float())  # (b, c, h, w)
    return batch.weight * errors.flatten(1).mean(1)


def with_prior(losses: Tensor, prior_loss_weight: float) -> Tensor:
    """ℓ_i + w ℓ'_i (b,) of a doubled batch of losses (2b,): b instance images, then b class images.

    The losses carry their samples' own weights already, so that min-SNR and the prior go together.

    Raises:
        ValueError: the batch isn't a doubled one.
    """
    if len(losses) % 2:
        raise ValueError(f"a batch with class images has as many of them as instance images, got {len(losses)} in all.")
    instance, prior = losses.chunk(2)
    return instance + prior_loss_weight * prior
