"""The PEFT plugin: configuration, injection, the holder of cores, merging, files."""
