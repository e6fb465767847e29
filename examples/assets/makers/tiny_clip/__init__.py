"""clip-tiny: its vocabulary, how well it retrieves, its card."""
