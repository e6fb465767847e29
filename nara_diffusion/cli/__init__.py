"""The command line `nara`: inspect, plot, compare, convert, check and evaluate adapters."""
