"""Configurations in other tools' words: each dialect is a table of keys, and its defaults where they decide what is learned."""
