"""The values of `--adapter`: from arguments to an adapted model."""
