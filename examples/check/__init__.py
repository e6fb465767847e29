"""Short trainings that measure whether λ helps an adapter, for `examples/nara_check.py`; see README.md."""
