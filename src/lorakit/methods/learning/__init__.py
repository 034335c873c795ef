"""Survey 3.3: learning procedure."""
