"""The quality benchmark: is an adapter better if it knows the noise level? See ../benchmark_quality.py."""
