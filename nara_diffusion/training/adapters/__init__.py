"""The methods of `--adapter`: from the arguments of a train script to an adapted model."""
