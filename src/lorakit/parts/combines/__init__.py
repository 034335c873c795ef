"""How a delta meets the frozen output, where two or more methods share it."""
