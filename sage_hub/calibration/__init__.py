"""What the base model's layers see of the proxies, and what it takes to find out."""
