"""Changes of the model around W: what attention sees and how, what a backward pass skips."""
