"""Patterns: kinds of sites that a file describes, as a few lines of dataflow over op names.

    match:
      - g = linear(x, W_g)
      - u = linear(x, W_u)
      - out = linear(silu(g) * u, W_d)

`terms` holds a pattern as a value, `lines` and `reading` make one from YAML, `match` finds it in a graph and `sites`
makes sites of what was found. Nothing up to the matcher imports torch.
"""
