"""Code that both train scripts share: arguments, runs, checkpoints, training loop, reports."""
