"""Side-by-side runs against peers; run them from the repository's root: `python -m benchmarks.train_step`."""
