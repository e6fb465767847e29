"""Map λ (b,) to C (b, r, r) in plain torch."""
