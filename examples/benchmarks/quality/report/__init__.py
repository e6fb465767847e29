"""Tables and pictures of RESULTS.md and the pages of examples/benchmarks/results, from the records alone."""
