"""Routers: from logits over experts to the gates by which the experts are mixed."""
