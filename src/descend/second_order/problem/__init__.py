"""What is minimized: structures of tensors as flat vectors, objectives with derivatives, bounds, sharded parameters."""
