"""Rules and forms for peftc, with the ops they call."""
