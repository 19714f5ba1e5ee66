"""State dictionaries: matched, checked, loaded."""
