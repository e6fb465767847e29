"""What draws the subjects, from examples/assets/makers."""

from __future__ import annotations

import sys

from quality.assets import MAKERS

sys.path.append(str(MAKERS))

from make_subject import in_places, in_poses
from tiny_drawings.places import PLACES
from tiny_drawings.subjects import SUBJECTS

__all__ = ["PLACES", "SUBJECTS", "in_places", "in_poses"]
