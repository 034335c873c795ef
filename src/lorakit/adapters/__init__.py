"""Adapters at rest: lorakit's own folders, PEFT's folders, conversion between them, and what is inside. Pure: no model is changed here."""
