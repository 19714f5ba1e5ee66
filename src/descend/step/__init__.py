"""One step: planned, validated, taken."""
