"""Adapted layers, which compute y = W0 x + s B C A x."""
