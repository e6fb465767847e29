"""Two adapted layers and a batch of three samples, for the tests of channels and parts."""

from tests.helpers.two_layers import model, x

__all__ = ["model", "x"]
