"""Adapted models used as people use models of transformers: called, trained, saved, copied, asked for text."""
