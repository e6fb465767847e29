"""The text benchmark: domains of questions, their validation loss over λ, and one run of a method on them."""
