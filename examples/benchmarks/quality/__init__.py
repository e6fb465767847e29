"""The quality benchmark: is an adapter better if it knows the noise level? See ../benchmark_quality.py."""

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).parents[2]))  # examples/, with nara_check and the identity reading
