"""What the train scripts share, whatever they train: arguments, runs, checkpoints, loop, reports."""
