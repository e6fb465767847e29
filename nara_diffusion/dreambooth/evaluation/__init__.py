"""Subject fidelity, prompt fidelity and samples, before and after."""
