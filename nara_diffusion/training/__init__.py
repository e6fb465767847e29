"""What both train scripts share: arguments, runs, checkpoints, the training loop, reports."""
