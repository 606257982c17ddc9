"""Checking: mistakes of rules told at once, the tests that rules hold, and the tiny models that these run on."""
