"""Deltas in the formats of other libraries: adapters of Hugging Face PEFT, and checkpoints of AdapterHub.

    adapter directory -> `adapter` (files as they are) -> `layout` (which tensor belongs to which layer)
                      -> `rule_text` (a rule that addresses these layers) -> plan -> `reading` -> delta directory

What a method is called, which tensors it stores and what they compute stands in `methods.yaml`; no code knows a method.
"""
