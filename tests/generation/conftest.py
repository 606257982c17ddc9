"""Adapted models in float64, deltas far from zero, each made once; and prompts."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from families.family import _GROUPED, _TEXT, BY_NAME, Family, fill, softmax_keeps_float64
from torch import Tensor

import peftc

MORE = (
    Family("mistral", "MistralForCausalLM", {**_GROUPED, "sliding_window": 6}, (), (), {}, {}, decoder=True),
    Family("gpt_neox", "GPTNeoXForCausalLM", {**_TEXT, "rotary_pct": 0.5}, (), (), {}, {}, decoder=True),
)
FAMILIES = {**BY_NAME, **{family.name: family for family in MORE}}

HYPERS: dict[str, dict[str, object]] = {
    "mam": {"l": 3, "r": 5, "s": 2.0}, "lora": {"r": 4}, "prefix": {"l": 3}, "houlsby": {"r": 5},
    "prefix_gated": {"l": 3}, "prompt": {"l": 4}, "unipelt": {},
}  # fmt: skip


@pytest.fixture(scope="package", autouse=True)
def softmax_in_float64() -> Iterator[None]:
    with softmax_keeps_float64():
        yield


@dataclass(frozen=True)
class Subject:
    """An adapted model and its family."""

    family: Family
    rule: str
    model: Any

    @property
    def seq2seq(self) -> bool:
        return self.family.seq2seq

    @property
    def tokens(self) -> str:
        return "decoder_input_ids" if self.seq2seq else "input_ids"

    def logits(self, given: dict[str, Any], ids: Tensor, mask: Tensor | None = None) -> Tensor:
        """The full forward, of a text that continues what was given."""
        call = {**given, self.tokens: ids}
        if mask is not None and not self.seq2seq:
            call |= {"attention_mask": mask}
            if self.takes_positions:
                call["position_ids"] = (mask.cumsum(-1) - 1).clamp(min=0)
        with torch.no_grad():
            return self.model(**call).logits

    @property
    def takes_positions(self) -> bool:
        import inspect

        return "position_ids" in inspect.signature(self.model.surgery.base_class.forward).parameters


Make = Callable[..., Subject]


@pytest.fixture(scope="session")
def made(tmp_path_factory: pytest.TempPathFactory) -> Make:
    """Family, rule and attention -> the adapted model; nobody may train it."""
    root = tmp_path_factory.mktemp("generation")
    subjects: dict[tuple[str, ...], Subject] = {}

    def make(name: str, rule: str, attention: str = "", **overrides: object) -> Subject:
        key = (name, rule, attention, str(overrides))
        if key not in subjects:
            family = FAMILIES[name]
            path: Path = root / f"{name}{attention}{len(subjects)}"
            family.build(**overrides).double().save_pretrained(path)
            model = peftc.apply(rule, path, set=HYPERS[rule], seed=0, dtype=torch.float64)
            if attention:
                model.set_attn_implementation(attention)
            for parameter in fill(model).values():
                parameter.data.mul_(3)
            subjects[key] = Subject(family, rule, model)
        return subjects[key]

    return make


def prompts(size: int, length: int = 7) -> dict[str, Tensor]:
    """`size` prompts, padded at the left as generation wants them, each two tokens shorter than the one before."""
    generator = torch.Generator().manual_seed(4)
    mask = (torch.arange(length) >= 2 * torch.arange(size)[:, None]).long()
    ids = torch.randint(3, 99, (size, length), generator=generator)
    return {"input_ids": torch.where(mask.bool(), ids, 1), "attention_mask": mask}
