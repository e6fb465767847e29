"""λ (b,) → C (b, r, r), with torch only: one module for each kind of core."""
