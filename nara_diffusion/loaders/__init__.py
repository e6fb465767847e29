"""Files of NaRA adapters, and loading, saving and unloading them in Diffusers pipelines."""
