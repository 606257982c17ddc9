"""Every seed method written by hand in plain torch, inside a plain BERT and a plain BART.

Nothing here imports peftc: the formulas are those of the papers, and the tests hold peftc to them.
"""
