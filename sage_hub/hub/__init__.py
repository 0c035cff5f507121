"""The Hugging Face Hub, asked with patience."""
