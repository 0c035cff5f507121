"""One module a command, and what they share: the survey that refuses before work."""
