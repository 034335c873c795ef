"""What reads a posterior over an adapter."""
