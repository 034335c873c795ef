"""Training: the loop, checkpoints and exact resume, reports, and what a step costs in memory."""
