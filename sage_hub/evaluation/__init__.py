"""What models make of the sets, in figures, and how they compare."""
