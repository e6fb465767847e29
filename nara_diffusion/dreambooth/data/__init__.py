"""Images, captions and the training samples made of them."""
