"""How the training loss of a micro-batch is made of several forwards of it."""
