"""Starting tensors."""
