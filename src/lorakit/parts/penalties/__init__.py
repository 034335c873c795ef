"""Extra loss terms."""
