"""What any part may use; it knows nothing of adapters."""
