"""A model to run, of which a block of layers is in memory at a time."""
