"""Tiny random models on disk, and one function that adapts, fills, saves, merges, loads and compares."""

from __future__ import annotations

import copy
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers

import peftc
from peftc import driver
from peftc.backends import hf
from peftc.fold.decide import Decision
from peftc.fold.state import FoldedState
from peftc.frontend.trace import build_skeleton
from peftc.lang.loader import parse_rule
from peftc.passes.fold import Fold
from peftc.runtime.graph_model import state_of
from peftc.store.model_dir import ModelDir

VOCABULARY = 64
_SMALL = {"vocab_size": VOCABULARY, "pad_token_id": 1, "bos_token_id": 0, "eos_token_id": 2}
_LLAMA = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 4}


def tiny(family: str) -> Any:
    """A random model of one or two layers in float64, with weights large enough to matter, and every bias off zero."""
    model = _BUILDERS[family]().double()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            is_scale = parameter.dim() == 1 and name.endswith("weight")
            parameter.copy_(1 + 0.1 * noise if is_scale else 0.2 * noise)
    return model.eval()


def _bert(cls: str = "BertModel", **extra: Any) -> Any:
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 24}
    config = transformers.BertConfig(**{**_SMALL, **sizes, "max_position_embeddings": 32, **extra})
    return getattr(transformers, cls)(config)


def _bart() -> Any:
    sizes = {"encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 4, "decoder_attention_heads": 4}
    config = transformers.BartConfig(
        **_SMALL, **sizes, d_model=16, encoder_ffn_dim=24, decoder_ffn_dim=20, max_position_embeddings=32,
        decoder_start_token_id=2, forced_eos_token_id=None,
    )  # fmt: skip
    return transformers.BartForConditionalGeneration(config)


def _gpt2() -> Any:
    config = transformers.GPT2Config(**_SMALL, n_embd=16, n_layer=1, n_head=4, n_positions=32)
    return transformers.GPT2LMHeadModel(config)


def _opt() -> Any:
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 4, "ffn_dim": 24}
    config = transformers.OPTConfig(**_SMALL, **sizes, word_embed_proj_dim=16, max_position_embeddings=32)
    return transformers.OPTForCausalLM(config)


def _bloom() -> Any:
    return transformers.BloomForCausalLM(transformers.BloomConfig(**_SMALL, hidden_size=16, n_layer=1, n_head=4))


def _t5() -> Any:
    config = transformers.T5Config(
        **{**_SMALL, "pad_token_id": 0}, d_model=16, d_kv=4, d_ff=24, num_layers=1, num_heads=4,
        decoder_start_token_id=0,
    )  # fmt: skip
    return transformers.T5ForConditionalGeneration(config)


def _distilbert() -> Any:
    config = transformers.DistilBertConfig(
        vocab_size=VOCABULARY, pad_token_id=1, dim=16, n_layers=1, n_heads=4, hidden_dim=24, max_position_embeddings=32
    )
    return transformers.DistilBertModel(config)


def _llama() -> Any:
    config = transformers.LlamaConfig(**_SMALL, **_LLAMA, num_key_value_heads=2, max_position_embeddings=32)
    return transformers.LlamaForCausalLM(config)


def _phi3(**extra: Any) -> Any:
    config = transformers.Phi3Config(
        **{**_SMALL, **_LLAMA, **extra}, num_key_value_heads=2, max_position_embeddings=32,
        original_max_position_embeddings=32,
    )  # fmt: skip
    return transformers.Phi3ForCausalLM(config)


def _albert() -> Any:
    config = transformers.AlbertConfig(
        **_SMALL, hidden_size=16, embedding_size=8, num_hidden_layers=2, num_attention_heads=4, intermediate_size=24,
        max_position_embeddings=32,
    )  # fmt: skip
    return transformers.AlbertModel(config)


_BUILDERS = {
    "bert": _bert,
    "bert_mlm": lambda: _bert("BertForMaskedLM"),
    "bert_relu": lambda: _bert(hidden_act="relu"),
    "bart": _bart,
    "gpt2": _gpt2,
    "opt": _opt,
    "bloom": _bloom,
    "t5": _t5,
    "distilbert": _distilbert,
    "llama": _llama,
    "phi3": _phi3,
    "phi3_deep": lambda: _phi3(num_hidden_layers=2),
    "albert": _albert,
}


@dataclass(frozen=True, slots=True)
class Merged:
    """An adapted model, and the plain one that its merged directory loads as."""

    base: Path
    adapted: Any
    out: Path
    plain: Any
    decisions: tuple[Decision, ...] = ()

    @property
    def certificate(self) -> dict[str, Any]:
        return json.loads((self.out / "certificate.json").read_text(encoding="utf-8"))

    @property
    def results(self) -> dict[str, set[str]]:
        """What became of each delta."""
        made = [(d.insertion.delta, d.result) for d in self.decisions]
        made = made or [(d["delta"], d["result"]) for d in self.certificate["decisions"]]
        found: dict[str, set[str]] = {}
        for delta, result in made:
            found.setdefault(delta.partition(".")[0], set()).add(result)
        return found

    @property
    def difference(self) -> float:
        """The largest absolute difference of the outputs on padded inputs."""
        return largest_difference(self.adapted, self.plain)

    def changed(self) -> set[str]:
        """Names of stored tensors that differ in shape or in a byte from the base's."""
        before, after = ModelDir.open(self.base), ModelDir.open(self.out)
        return {name for name in after.tensors if name not in before.tensors or not same(before, after, name)}


def same(before: ModelDir, after: ModelDir, name: str) -> bool:
    old, new = before.read(name), after.read(name)
    return old.dtype == new.dtype and old.shape == new.shape and torch.equal(old, new)


def padded_inputs(model: Any) -> dict[str, torch.Tensor]:
    """Three rows of 9, 6 and 3 tokens; decoder inputs of 5."""
    generator = torch.Generator().manual_seed(2)
    mask = (torch.arange(9) < torch.tensor([9, 6, 3])[:, None]).long()
    ids = torch.where(mask.bool(), torch.randint(3, VOCABULARY, (3, 9), generator=generator), 1)
    inputs = {"input_ids": ids, "attention_mask": mask}
    if model.config.is_encoder_decoder:
        inputs["decoder_input_ids"] = torch.randint(3, VOCABULARY, (3, 5), generator=generator)
    return inputs


def outputs(model: Any) -> list[torch.Tensor]:
    inputs = padded_inputs(model)
    extra = {"use_cache": False} if hasattr(model.config, "use_cache") else {}
    with torch.no_grad():
        found = model.eval()(**inputs, **extra).to_tuple()
    real = inputs["attention_mask"].bool()
    return [value[real] if value.shape[:2] == real.shape else value for value in found]


def largest_difference(one: Any, other: Any) -> float:
    pairs = list(zip(outputs(one), outputs(other), strict=True))
    assert pairs
    return max(float((a - b).abs().max()) for a, b in pairs)


def fill(model: Any, scale: float = 0.3) -> None:
    """Random values in every delta, and a nudge for the base parameters that the rule trains."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name in (*model.surgery.plan.parameters, *model.surgery.plan.trained):
            parameter = model.get_parameter(name)
            parameter.copy_(scale * torch.randn(parameter.shape, generator=generator, dtype=torch.float64))


def adapt(rule: str, base: Path, **options: Any) -> Any:
    """`rule` is a name of the library, or the YAML of a rule; deltas are filled with random values."""
    source = parse_rule(rule, "rule.yaml") if "\n" in rule else rule
    model = peftc.apply(source, base, **options)
    fill(model)
    return model


def fold(rule: str, base: Path, place: Path, **options: Any) -> Merged:
    """What `merge` does to the checkpoint, on the trace that the adapted model has already; no certificate."""
    adapted = adapt(rule, base, **options)
    out, source = place / "merged", ModelDir.open(base)
    out.mkdir(parents=True)
    program = adapted.program_for(padded_inputs(adapted))
    step = Fold()
    step.apply(program)
    hf.refuse_kept(step.decisions)
    surgery = adapted.surgery
    config = copy.deepcopy(adapted.config)
    config.architectures = [surgery.base_class.__name__]
    skeleton = build_skeleton(surgery.base_class, config, adapted.dtype)
    state = FoldedState(lambda name: state_of(adapted)[name].detach(), step.updates)
    hf.plan_checkpoint(
        source=source, skeleton=skeleton, program=program, decisions=step.decisions, folded=state,
        trained=surgery.plan.trained,
    ).write(out)  # fmt: skip
    return Merged(base, adapted, out, load_plain(out), tuple(step.decisions))


def merge(rule: str, base: Path, place: Path, export: frozenset[str] = frozenset({"hf"}), **options: Any) -> Merged:
    """Adapt `base`, save the deltas, merge them and load the result with transformers alone."""
    adapted = adapt(rule, base, **options)
    before = [value.clone() for value in outputs(adapted)]
    adapted.save_pretrained(place / "delta")
    driver.merge(place / "delta", place / "merged", export=set(export))
    plain = load_plain(place / "merged") if "hf" in export else None
    assert all(torch.equal(a, b) for a, b in zip(before, outputs(adapted), strict=True))
    return Merged(base, adapted, place / "merged", plain)


def load_plain(directory: Path) -> Any:
    config = transformers.AutoConfig.from_pretrained(directory)
    cls = getattr(transformers, config.architectures[0])
    model, info = cls.from_pretrained(directory, dtype="auto", output_loading_info=True)
    assert not info["missing_keys"] and not info["mismatched_keys"], info
    assert not type(model).__module__.startswith("peftc")
    return model.eval()


def rule(text: str) -> str:
    """A rule from its `hyper` and `deltas` alone."""
    return f"peftc: 1\nname: test\n{text}\n"
