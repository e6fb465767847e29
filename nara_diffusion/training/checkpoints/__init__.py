"""checkpoint-N: what a run needs to go on, and what it compares before it does."""
