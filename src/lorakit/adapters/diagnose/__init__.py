"""Diagnostics on adapters at rest: how far apart they are, which directions they use, what they amplify, and what their spectra are."""
