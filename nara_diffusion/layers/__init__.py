"""y = W0 x + s B C A x: the adapted layers."""
