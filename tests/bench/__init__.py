"""Measurements, run by `make bench`; each prints its figure and fails beyond its bound."""
