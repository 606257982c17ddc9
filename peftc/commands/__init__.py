"""Commands: what `peftc` asks for on its command line, and what it prints."""
