"""The baselines of the LoRA paper: modules, prefixes, biases."""
