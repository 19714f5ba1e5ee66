"""Optimizer state: the container, new tensors, lazily committed memory."""
