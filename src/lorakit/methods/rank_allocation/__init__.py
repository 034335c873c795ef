"""Survey 3.2: rank allocation."""
