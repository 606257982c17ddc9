"""Hot-swappable ONNX: one `model.onnx` of a base whose deltas are optional inputs, and a file of values for each delta.

An optional input is a graph input that is an initializer too: without an adapter its default holds, and with the
defaults the graph is the base's. Which sizes of a delta are open, which defaults are neutral, and which deltas can
share inputs is read off the graph; no method is known by name.
"""
