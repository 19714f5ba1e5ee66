"""State in the host's memory for parameters on a device: copies, buckets, and how they travel."""
