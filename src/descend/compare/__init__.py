"""The command line ``descend compare``; ``import descend`` never loads it."""
