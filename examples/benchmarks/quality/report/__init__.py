"""RESULTS.md, from the records of both benchmarks alone."""
