"""Survey 2.4: beyond fine-tuning: continual learning."""
