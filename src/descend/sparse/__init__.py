"""What a sparse gradient means: touched rows, and tables that catch up."""
