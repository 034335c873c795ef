"""Survey 5.1: parameter reduction."""
