"""Survey 5.2: quantization."""
