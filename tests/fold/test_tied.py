"""Weights that two modules share, and biases that a layer lacks: refused, or made as the class can have them."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from fold.conftest import Checkpoints
from fold.support import adapt, load_plain, outputs, rule, tiny
from peftc import driver
from peftc.diagnostics import PeftcError
from peftc.store.model_dir import ModelDir

HEAD = rule("""deltas:
  head: {at: linear, where: {path: ["lm_head", "cls.predictions.decoder"]}, modify: out, insert: parallel,
         form: low_rank, with: {r: 2}}""")
EMBEDDING = rule("""deltas:
  rows: {at: embedding, where: {role: token}, modify: weight, form: low_rank_weight, with: {r: 2}}""")
NAMES = {
    "llama_tied": ("lm_head.weight", "model.embed_tokens.weight"),
    "bert_mlm": ("cls.predictions.decoder.weight", "bert.embeddings.word_embeddings.weight"),
}


@pytest.fixture(scope="module")
def base(checkpoint: Checkpoints, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The directory of a tied Llama, or of a tied BERT with its masked LM head."""
    llama = tiny("llama")
    config = copy.deepcopy(llama.config)
    config.tie_word_embeddings = True
    tied = transformers.LlamaForCausalLM(config).double()
    tied.load_state_dict(llama.state_dict())
    tied.tie_weights()
    tied.save_pretrained(tmp_path_factory.mktemp("tied") / "base")
    made = {"llama_tied": tmp_path_factory.getbasetemp(), "bert_mlm": checkpoint("bert_mlm")}
    made["llama_tied"] = sorted(made["llama_tied"].glob("tied*/base"))[-1]
    return made.__getitem__


def saved(source: str, base: Path, place: Path) -> Any:
    adapted = adapt(source, base)
    adapted.save_pretrained(place / "delta")
    return adapted


@pytest.mark.parametrize("family", ["llama_tied", pytest.param("bert_mlm", marks=pytest.mark.slow)])
def test_a_delta_on_one_side_of_a_tie_is_refused_or_unties(family: str, base: Any, tmp_path: Path) -> None:
    head, embedding = NAMES[family]
    adapted = saved(HEAD, base(family), tmp_path)
    with pytest.raises(PeftcError) as refused:
        driver.merge(tmp_path / "delta", tmp_path / "merged")
    (diagnostic,) = refused.value.diagnostics
    assert "is tied" in diagnostic.message and "--tied untie" in (diagnostic.help or "")
    report = driver.merge(tmp_path / "delta", tmp_path / "merged", tied="untie", undo=True)
    assert all(c.holds and c.absolute < 1e-10 for c in report.comparisons) and report.comparisons
    merged, before = ModelDir.open(tmp_path / "merged"), ModelDir.open(base(family))
    assert head not in before.tensors and torch.equal(merged.read(embedding), before.read(embedding))
    parameters = dict(adapted.named_parameters())
    a, b = (next(p for n, p in parameters.items() if n.endswith(f"peftc.head.{part}")).double() for part in "AB")
    assert torch.allclose(merged.read(head), before.read(embedding) + b @ a, rtol=0, atol=1e-12)
    plain = load_plain(tmp_path / "merged")
    assert plain.config.tie_word_embeddings is False
    for one, other in zip(outputs(plain), outputs(adapted), strict=True):
        assert float((one - other).abs().max()) < 1e-10
    driver.unmerge(tmp_path / "merged", tmp_path / "again")
    for file in base(family).iterdir():
        assert (tmp_path / "again" / file.name).read_bytes() == file.read_bytes()


@pytest.mark.slow
@pytest.mark.parametrize("family", NAMES)
def test_both_sides_of_a_tie_change_once_where_that_is_asked(family: str, base: Any, tmp_path: Path) -> None:
    head, embedding = NAMES[family]
    adapted = saved(HEAD, base(family), tmp_path)
    report = driver.merge(tmp_path / "delta", tmp_path / "merged", tied="both")
    assert not report.comparisons and "on both sides" in report.notes[0]
    merged, before = ModelDir.open(tmp_path / "merged"), ModelDir.open(base(family))
    assert merged.tensors.keys() == before.tensors.keys()
    parameters = dict(adapted.named_parameters())
    a, b = (next(p for n, p in parameters.items() if n.endswith(f"peftc.head.{part}")).double() for part in "AB")
    assert torch.allclose(merged.read(embedding), before.read(embedding) + b @ a, rtol=0, atol=1e-12)
    plain = load_plain(tmp_path / "merged")
    assert plain.get_parameter(head) is plain.get_parameter(embedding)


def test_two_deltas_on_one_tied_tensor_are_never_added_up(base: Any, tmp_path: Path) -> None:
    both = HEAD + EMBEDDING[EMBEDDING.index("  rows:") :]
    adapted = saved(both, base("llama_tied"), tmp_path)
    with pytest.raises(PeftcError) as refused:
        driver.merge(tmp_path / "delta", tmp_path / "merged", tied="both")
    assert "which is one tensor for both" in refused.value.diagnostics[0].message
    report = driver.merge(tmp_path / "delta", tmp_path / "merged", tied="untie")
    assert all(c.holds and c.absolute < 1e-10 for c in report.comparisons)
    for one, other in zip(outputs(load_plain(tmp_path / "merged")), outputs(adapted), strict=True):
        assert float((one - other).abs().max()) < 1e-10


@pytest.mark.slow
def test_a_merge_that_changes_no_tied_weight_leaves_the_tie(base: Any, tmp_path: Path) -> None:
    saved("lora", base("llama_tied"), tmp_path)
    driver.merge(tmp_path / "delta", tmp_path / "merged", tied="untie", outputs=False)
    assert load_plain(tmp_path / "merged").config.tie_word_embeddings is True


BIASED = {
    "llama": ("[q, up]", {"attention_bias": True, "mlp_bias": True}),
    "phi3": ("[qkv]", None),
}


@pytest.mark.slow
@pytest.mark.parametrize("family", BIASED)
def test_a_missing_bias_is_created_where_the_class_can_have_one(
    family: str, checkpoint: Checkpoints, tmp_path: Path
) -> None:
    roles, settings = BIASED[family]
    source = rule(f"""deltas:
  lora: {{at: linear, where: {{role: {roles}}}, modify: out, insert: parallel, form: low_rank_bias, with: {{r: 2}}}}""")
    adapted = saved(source, checkpoint(family), tmp_path)
    if settings is None:
        with pytest.raises(PeftcError) as refused:
            driver.merge(tmp_path / "delta", tmp_path / "merged")
        assert "it adds a bias" in refused.value.diagnostics[0].message
        return
    report = driver.merge(tmp_path / "delta", tmp_path / "merged", undo=True)
    assert all(c.holds and c.absolute < 1e-10 for c in report.comparisons) and report.comparisons
    plain = load_plain(tmp_path / "merged")
    assert {name: getattr(plain.config, name) for name in settings} == settings
    assert plain.model.layers[0].self_attn.q_proj.bias.any() and not plain.model.layers[0].self_attn.v_proj.bias.any()
    for one, other in zip(outputs(plain), outputs(adapted), strict=True):
        assert float((one - other).abs().max()) < 1e-10
    driver.unmerge(tmp_path / "merged", tmp_path / "again")
    for file in checkpoint(family).iterdir():
        assert (tmp_path / "again" / file.name).read_bytes() == file.read_bytes()
