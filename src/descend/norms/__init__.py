"""Norms over tensors, and clipping as functions."""
