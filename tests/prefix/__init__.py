"""Prefix tuning in both lowerings, under every kind of mask."""
