"""Where the models and pictures that come with the project lie, and the programs that make them."""

from __future__ import annotations

from pathlib import Path

ASSETS = Path(__file__).parents[2] / "assets"
MAKERS = ASSETS / "makers"  # scripts beside each other, no package: who imports one puts this on the path
