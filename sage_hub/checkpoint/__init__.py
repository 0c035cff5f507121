"""What a model is on disk: files, tensors in them, adapters, and what architecture they are of."""
