"""Two adapted layers and a batch of three samples, for the tests of λ's contexts and sources."""

from tests.helpers.two_layers import model, x

__all__ = ["model", "x"]
