"""Symbolic shapes: what every tensor of a rule is, without a model and without torch.

    x is [.., d_in], W_down is [r, d_in], linear(x, W_down) is [.., r]

`polynomial` reckons with sizes, `terms` compares and broadcasts shapes, `rules` says what each op makes of them, and
`check` walks the expressions of a row or a form and tells what cannot fit.
"""
