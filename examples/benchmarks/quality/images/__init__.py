"""The image benchmark: subjects, held-out pictures, samples and their judge, and one run of a method on them."""
