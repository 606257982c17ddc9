"""Parameter groups for an optimizer: the learning rate that each delta parameter asks for (`lr` in a rule).

groups = peftc.parameter_groups(model, lr=1e-4, weight_decay=0.01)
trainer = Trainer(model, ..., optimizers=(torch.optim.AdamW(groups), None))
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from peftc.diagnostics import fail

if TYPE_CHECKING:
    import torch


def parameter_groups(model: Any, *, lr: float, weight_decay: float = 0.0) -> list[dict[str, Any]]:
    """The parameters of an adapted model that train, grouped by learning rate and weight decay.

    A delta parameter whose rule says `lr: n` gets n times `lr`, any other `lr`. Vectors (biases, norms, gains) do not
    decay. Every parameter that requires a gradient is in exactly one group. Raises `PeftcError` E041 for a model that
    peftc has not adapted.
    """
    surgery = getattr(model, "surgery", None)
    if surgery is None:
        help = "give the model that peftc.apply or peftc.load returned"
        fail("E041", f"a {type(model).__name__} has no deltas, whose learning rates could be read", help=help)
    deltas = surgery.plan.parameters
    groups: dict[tuple[float, float], list[torch.nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            rate = deltas[name].lr if name in deltas else 1.0
            decay = weight_decay if parameter.dim() > 1 else 0.0
            groups.setdefault((rate, decay), []).append(parameter)
    found = sorted(groups.items(), key=lambda group: group[0])
    return [{"params": held, "lr": lr * rate, "weight_decay": decay} for (rate, decay), held in found]
