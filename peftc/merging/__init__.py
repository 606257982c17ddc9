"""Merging: a delta directory and its base become a checkpoint with a certificate, and back."""
