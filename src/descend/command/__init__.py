"""The command ``descend``: its options and its exit status. Torch is imported when a command runs, not for its help."""
