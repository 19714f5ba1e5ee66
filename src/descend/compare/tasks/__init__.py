"""The tasks: real data that every machine has, a small model, and suitable defaults."""
