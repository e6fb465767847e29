"""The arguments of the train scripts: declared once, read from flags and from YAML, and checked."""
