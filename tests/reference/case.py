"""What a test needs of a base model."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from reference.method import Method, State


@dataclass(frozen=True)
class Case:
    """A model directory, the Hugging Face model of it, the inputs, and the two ways to its outputs."""

    name: str
    directory: Path
    model: nn.Module
    inputs: dict[str, Tensor]
    plain: Callable[[State, Method, dict[str, Tensor]], tuple[Tensor, ...]]
    """(base weights, method, inputs) -> outputs of the reference."""
    outputs: Callable[[Any], tuple[Tensor, ...]]
    """The same outputs from what the Hugging Face model, or peftc's, returns."""
