"""Survey 3.1: the low-rank bottleneck."""
