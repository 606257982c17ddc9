"""Commands: what `peftc` does for each of its commands, and how the result is told."""
