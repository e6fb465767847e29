"""What the train scripts share, whatever they train: arguments, runs, checkpoints, the loop, reports. Needs `[train]`."""
