"""What is trained whole beside the deltas, where a name cannot say it."""
