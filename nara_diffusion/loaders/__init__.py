"""Loading, saving and unloading the NaRA adapter of a Diffusers pipeline.

The order is source → format → validation → insertion or hotswap. `completeness` compares the model with the file after
each load. `weights` has the three methods of pipelines.
"""

from .format import WEIGHTS_NAME
from .weights import load_nara_weights, save_nara_weights, unload_nara_weights

__all__ = ["WEIGHTS_NAME", "load_nara_weights", "save_nara_weights", "unload_nara_weights"]
