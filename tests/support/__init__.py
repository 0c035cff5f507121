"""What tests share: a Hub on this machine, pico checkpoints, references in float64."""
