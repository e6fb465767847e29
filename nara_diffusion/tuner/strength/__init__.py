"""The strength of an adapter as a function of λ: s(λ) · C(λ) in the place of C(λ)."""
