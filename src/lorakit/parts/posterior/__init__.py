"""A Gaussian posterior over an adapter: its factors, and how they are found."""
