"""What becomes of every tensor: the plan, the gain, and the pass over the weights."""
