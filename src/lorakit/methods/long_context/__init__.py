"""Longer texts than the base was trained on."""
