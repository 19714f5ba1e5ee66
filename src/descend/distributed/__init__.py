"""Parameters that several ranks share: local tensors, and reductions over the ranks."""
