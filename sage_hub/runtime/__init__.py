"""The process and its machine: what it shows, who works together, how much memory there is."""
