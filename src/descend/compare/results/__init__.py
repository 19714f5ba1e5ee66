"""What the runs of a comparison say: gathered by optimizer, judged, drawn."""
