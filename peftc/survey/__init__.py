"""Families: how far peftc gets with each model type of transformers, measured on a tiny random model of it.

Nothing is listed by hand: the model types are those of transformers' own mappings, the models come from default
configs made small (`shrink`), and what should be found is counted from the class names of the module tree
(`census`), never by peftc's own finders.

    record = measure("llama")       # in this process
    records = sweep(["llama", "bert"], seconds=120)     # each in a process of its own, bounded in time and memory
"""
