"""Survey 3.4: other learning paradigms."""
