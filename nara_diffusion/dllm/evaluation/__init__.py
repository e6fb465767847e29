"""How good a fine-tuned language model is, before and after."""
