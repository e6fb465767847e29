"""Loading, saving and unloading the NaRA adapter of a Diffusers pipeline.

source → format → checks → adapters or hotswap, each knowing the ones before it; `completeness` compares what is in the
model after any load with its file; `pipelines` has the three methods.
"""

from .format import WEIGHTS_NAME
from .weights import load_nara_weights, save_nara_weights, unload_nara_weights

__all__ = ["WEIGHTS_NAME", "load_nara_weights", "save_nara_weights", "unload_nara_weights"]
