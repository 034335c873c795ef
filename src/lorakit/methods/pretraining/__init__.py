"""Survey 2.4: beyond fine-tuning: pre-training."""
