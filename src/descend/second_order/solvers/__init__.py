"""Loops that minimize an objective: their limits, their reasons to stop, and what they return."""
