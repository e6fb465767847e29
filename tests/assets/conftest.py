"""The makers are programs beside each other, not a package: their folder goes on the path, as when one of them runs."""

import sys
from pathlib import Path

ASSETS = Path(__file__).parents[2] / "examples" / "assets"
sys.path.insert(0, str(ASSETS))
