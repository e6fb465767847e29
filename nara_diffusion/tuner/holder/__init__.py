"""The holder of an adapted model's cores, and how it makes C(λ) from λ."""
