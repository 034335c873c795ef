"""What happens to a finished adapter on its model: open, generate, merge for deployment."""
