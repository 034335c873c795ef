"""Survey 4.3: mixture of LoRA experts."""
