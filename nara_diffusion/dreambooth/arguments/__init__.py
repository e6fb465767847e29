"""The arguments of image training, by what they are about."""

from .dreambooth import DreamBoothArguments

__all__ = ["DreamBoothArguments"]
