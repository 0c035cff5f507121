"""The mathematics of SAGE: tensors in, tensors out."""
