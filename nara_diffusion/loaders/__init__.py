"""Loading, saving and unloading the NaRA adapters of Diffusers pipelines, and the files that hold them."""
