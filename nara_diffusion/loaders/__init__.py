"""Read and write adapter files, and load, save and unload adapters in Diffusers pipelines."""
