"""The quality benchmark: is an adapter that knows the noise level better than one that doesn't? See benchmark_quality.py."""
