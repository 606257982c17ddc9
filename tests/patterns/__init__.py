"""Patterns: what they find in graphs, what a delta at their sites computes, and what a mistake is told as."""
