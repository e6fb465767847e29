"""The PEFT plugin, which injects, merges and saves adapters and owns their cores."""
