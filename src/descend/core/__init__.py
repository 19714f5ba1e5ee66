"""What the engine knows of a method: its base class, options, groups, signatures."""
