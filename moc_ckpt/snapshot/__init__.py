"""Device to host: live tensors as bytes."""
