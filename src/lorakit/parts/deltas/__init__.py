"""Trained changes of a site that two or more methods share."""
