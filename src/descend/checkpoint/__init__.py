"""State dictionaries: match, check and load them."""
