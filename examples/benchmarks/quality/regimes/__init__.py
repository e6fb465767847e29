"""The benchmark of regimes: where the update that is needed depends on λ. See ../../benchmark_regimes.py."""
