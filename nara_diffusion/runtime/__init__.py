"""One forward, safely: how C(λ) reaches the layers, in recomputation, offloading, threads and compiled graphs."""
