"""Survey 5.1.3: parameter sharing."""
