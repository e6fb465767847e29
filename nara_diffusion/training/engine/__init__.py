"""accelerate's engines: one process, DDP, FSDP2 and DeepSpeed."""
