"""Regimes of images: what is trained, on what, and by what it is measured."""
