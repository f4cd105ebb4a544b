"""One file a method: what its tensors mean."""
