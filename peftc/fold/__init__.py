"""Folding by algebra: what an inserted subgraph computes decides what becomes of it, never the name of a method.

`affine` finds out which nodes are affine in the streams a delta reads, `decide` turns that into a decision for every
ledger entry, `updates` computes new weights by running the subgraph on the identity.
"""
