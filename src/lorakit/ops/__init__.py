"""The hot arithmetic. reference.py is the definition; a faster implementation has the same signatures and an equality test."""
