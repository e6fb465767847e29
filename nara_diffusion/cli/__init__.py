"""The command line `nara`: it inspects, draws, compares, converts, checks and evaluates
adapters."""
