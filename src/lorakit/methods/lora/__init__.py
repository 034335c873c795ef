"""Survey 2.1: LoRA itself."""
