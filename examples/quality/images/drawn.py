"""The programs that draw the subjects: scripts beside each other in examples/assets, no package."""

from __future__ import annotations

import sys

from quality.images.subjects import ASSETS

sys.path.append(str(ASSETS))

from tiny_held_out import in_places, in_poses
from tiny_places import PLACES
from tiny_subjects import SUBJECTS

__all__ = ["PLACES", "SUBJECTS", "in_places", "in_poses"]
