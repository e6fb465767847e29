"""λ (b,) → C (b, r, r), by torch alone: one module for each kind of core."""
