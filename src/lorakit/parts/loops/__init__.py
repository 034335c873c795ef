"""Parts that take the place of the ordinary step."""
