"""The graph in parts, each run by calling its module, is the graph run at once: hooks and checkpointing act on it."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, fx

import peftc
from peftc.checking.families import FAMILIES
from peftc.diagnostics import PeftcError
from peftc.lang.library import rule_files
from peftc.lang.loader import parse_rule
from peftc.runtime.hierarchy import Slice, slices
from peftc.runtime.parts import compiled
from peftc.runtime.units import checkpoints, mark_layers
from peftc.store.heads import resolve
from runtime.tiny import batch, moved, seq2seq_batch

Load = Callable[..., Any]
MAM = {"l": 3, "r": 4}
TWO = ("bert", "llama", *(pytest.param(name, marks=pytest.mark.slow) for name in ("gpt2", "bart")))
OTHERS = ("albert", *(name for name in FAMILIES if name not in ("bert", "llama", "gpt2", "bart")))


def step(model: Any, seed: int = 5, **given: Tensor) -> tuple[list[Tensor], dict[str, Tensor]]:
    """Outputs and gradients of one training step; dropout is drawn from `seed`."""
    model.train().zero_grad(set_to_none=True)
    torch.manual_seed(seed)
    result = model(**given)
    outputs = [value for value in result.to_tuple() if isinstance(value, Tensor)]
    sum((value * torch.linspace(0, 1, value.numel()).view(value.shape)).sum() for value in outputs).backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return [value.detach() for value in outputs], gradients


def assert_equal(found: tuple[list[Tensor], dict[str, Tensor]], wanted: tuple[list[Tensor], dict[str, Tensor]]) -> None:
    assert all(torch.equal(one, other) for one, other in zip(found[0], wanted[0], strict=True))
    assert found[1].keys() == wanted[1].keys()
    assert [name for name, value in wanted[1].items() if not torch.equal(found[1][name], value)] == []


def called(model: Any) -> list[str]:
    """The units of the graph that ran last, in the order of their calls."""
    parts = list(model.surgery.executors.values())[-1].parts
    return [] if parts is None else [part.unit for part in parts.steps if part.unit]


def given_to(model: Any) -> dict[str, Tensor]:
    return seq2seq_batch() if model.config.is_encoder_decoder else batch()


@pytest.mark.parametrize("name", TWO)
def test_checkpointed_step_is_the_plain_one_bit_for_bit_with_dropout(model_dir: Load, name: str) -> None:
    model = moved(peftc.apply("mam", model_dir(name), set=MAM, dtype=torch.float64))
    given = given_to(model)
    wanted = step(model, **given)
    assert not called(model)
    model.activation_checkpointing_enable()
    assert model.is_activation_checkpointing
    assert_equal(step(model, **given), wanted)
    assert len([unit for unit in called(model) if unit[-1].isdigit()]) == (4 if name == "bart" else 2)
    model.activation_checkpointing_disable()
    model.disable_input_require_grads()
    assert not model.is_activation_checkpointing
    assert_equal(step(model, **given), wanted)
    assert len(model.surgery.programs) == 1, "nothing is traced again"


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable` is deprecated:FutureWarning")
def test_evaluation_and_no_grad_need_no_parts(model_dir: Load) -> None:
    model = moved(peftc.apply("lora", model_dir("bert")))
    model.gradient_checkpointing_enable()  # the name before transformers 5.23
    assert any(getattr(module, "gradient_checkpointing", False) for module in model.modules())
    model.disable_input_require_grads()
    model.eval()(**batch())
    assert not called(model)
    with torch.no_grad():
        model.train()(**batch())
    assert not called(model)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::UserWarning")  # those of torch.compile itself, about what it skips
def test_a_compiled_model_checkpoints_as_one_that_is_not(model_dir: Load) -> None:
    model = moved(peftc.apply("lora", model_dir("llama"), dtype=torch.float64))
    wanted = step(model, **batch())
    model.activation_checkpointing_enable()
    compiled_model: Any = torch.compile(model, backend="aot_eager")
    outputs, gradients = step(compiled_model, **batch())
    names = {name.removeprefix("_orig_mod."): value for name, value in gradients.items()}
    assert_equal((outputs, names), wanted)
    assert called(model)


class Counted:
    """Counts the bytes that a step keeps for its backward pass: saved tensors, and what checkpoints keep."""

    def __init__(self) -> None:
        self.storages: dict[int, int] = {}
        self.held: list[Tensor] = []

    def keep(self, value: Any) -> Any:
        if isinstance(value, Tensor):
            self.held.append(value)  # or its memory would be given to another
            self.storages[value.untyped_storage().data_ptr()] = value.untyped_storage().nbytes()
        return value

    def checkpoint(self, function: Any, *args: Any) -> Any:
        from torch.utils.checkpoint import checkpoint

        for value in args:
            self.keep(value)
        return checkpoint(function, *args, use_reentrant=False)

    def of(self, model: Any, **given: Tensor) -> int:
        """Bytes kept by a forward pass, its parameters and buffers not counted."""
        owned = {value.untyped_storage().data_ptr() for value in (*model.parameters(), *model.buffers())}
        with torch.autograd.graph.saved_tensors_hooks(self.keep, lambda value: value):
            model.train()(**given)
        return sum(size for place, size in self.storages.items() if place not in owned)


def kept(model: Any, given: dict[str, Tensor]) -> tuple[int, int]:
    """Bytes that a step keeps without and with checkpointing."""
    plain = Counted().of(model, **given)
    count = Counted()
    model._set_gradient_checkpointing(enable=True, gradient_checkpointing_func=count.checkpoint)
    return plain, count.of(model, **given)


def test_checkpointing_keeps_less_than_a_third(model_dir: Load) -> None:
    plain, again = kept(peftc.apply("mam", model_dir("llama"), set=MAM), batch(4, 40))
    assert 0 < 3 * again < plain


@pytest.mark.bench
def test_bytes_kept_with_checkpointing_grow_by_the_hidden_state_of_a_layer(tmp_path: Path) -> None:
    """What is kept a layer: one hidden state with checkpointing, and many times that without."""
    from transformers import LlamaConfig, LlamaForCausalLM

    found = []
    for layers in (4, 8):
        sizes = {"hidden_size": 128, "intermediate_size": 512, "num_attention_heads": 4, "vocab_size": 99}
        LlamaForCausalLM(LlamaConfig(num_hidden_layers=layers, **sizes)).save_pretrained(tmp_path / str(layers))
        found.append(kept(peftc.apply("mam", tmp_path / str(layers)), batch(4, 128)))
    plain, again = ((large - small) / 4 for small, large in zip(*found, strict=True))
    hidden = 4 * 128 * 128 * 4
    print(f"\nbytes kept a layer: {plain:,.0f}, checkpointed {again:,.0f}; a hidden state {hidden:,}")
    print(f"eight layers, in all: {found[1][0]:,}, checkpointed {found[1][1]:,}")
    assert again < 1.1 * hidden
    assert plain > 15 * again


def test_reentrant_checkpoints_and_every_second_layer_give_the_same_gradients(model_dir: Load) -> None:
    model = moved(peftc.apply("lora", model_dir("llama"), dtype=torch.float64))
    wanted = step(model, **batch())
    model.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": True})
    assert_equal(step(model, **batch()), wanted)
    model._set_gradient_checkpointing(every_n_layers=2)
    assert_equal(step(model, **batch()), wanted)
    assert [unit for unit in called(model) if "layers" in unit] == ["model.layers.0"]


HOOKED = ("bert.embeddings.word_embeddings", "bert.encoder.layer.0", "bert.encoder.layer.1.attention.self.value")


def test_hooks_act_as_on_the_base_on_blocks_and_inside_them(model_dir: Load, plain: Load) -> None:
    model, base = peftc.apply("lora", model_dir("bert")), plain("bert")
    seen: list[list[Tensor]] = []
    for one in (model, base):
        inputs: list[Tensor] = []
        for path in HOOKED:
            module = one.get_submodule(path)
            module.register_forward_pre_hook(lambda _, args, inputs=inputs: inputs.append(args[0].detach()))
            module.register_forward_hook(lambda _, args, output: 1.5 * output)
        one.bert.encoder.layer[1].register_forward_pre_hook(lambda _, args: (args[0] + 1, *args[1:]))
        with torch.no_grad():
            seen.append([*inputs, one(**batch()).logits, *inputs])
    for found, wanted in zip(*seen, strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-6)
    assert called(model) == [*HOOKED[:2], "bert.encoder.layer.1"]


def test_a_block_called_by_itself_is_the_bases_and_a_copy_calls_its_own(model_dir: Load, plain: Load) -> None:
    model, base = moved(peftc.apply("lora", model_dir("bert"))), plain("bert")
    hidden = torch.randn(2, 5, 32)
    calls: list[Any] = []
    model.bert.encoder.layer[0].register_forward_hook(lambda module, *_: calls.append(module))
    wanted = model(**batch()).logits
    copied = copy.deepcopy(model)
    assert torch.equal(copied(**batch()).logits, wanted)
    torch.testing.assert_close(model.bert.encoder.layer[0](hidden), base.bert.encoder.layer[0](hidden))
    assert calls[:2] == [model.bert.encoder.layer[0], copied.bert.encoder.layer[0]]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["llama", "bart"])
def test_generation_calls_each_layer_once_a_token_and_writes_the_same(model_dir: Load, name: str) -> None:
    model = moved(peftc.apply("lora", model_dir(name)))
    asked: dict[str, Any] = {**batch(3, 6), "min_new_tokens": 5, "max_new_tokens": 5, "do_sample": False}
    asked |= {key: value.flip(1) for key, value in batch(3, 6).items()}
    wanted = model.generate(**asked)
    calls: list[str] = []
    for path, module in model.named_modules():
        if path.endswith("layers.0"):
            module.register_forward_hook(lambda *_, path=path: calls.append(path))
    model.activation_checkpointing_enable()
    assert torch.equal(model.generate(**asked), wanted)
    decoder = "model.decoder.layers.0" if name == "bart" else "model.layers.0"
    assert calls.count(decoder) == 5
    assert len(calls) == (6 if name == "bart" else 5), "the encoder runs once"


ACROSS = """\
peftc: 1
name: across
hyper: {r: 4}
deltas:
  skip: {at: block, modify: out, from: "block[layer - 1].out", form: low_rank, where: {if: layer > 0}}
  shared: {at: ffn, modify: out, form: "linear(linear(x, A), B)", params: {
    A: {shape: [r, d_in], init: normal(0.1), share: model}, B: {shape: [d_out, r], init: zeros}}}
"""


def test_values_and_parameters_may_cross_blocks(model_dir: Load) -> None:
    model = moved(peftc.apply(parse_rule(ACROSS, "across.yaml"), model_dir("llama"), dtype=torch.float64))
    wanted = step(model, **batch())
    model.activation_checkpointing_enable()
    assert_equal(step(model, **batch()), wanted)


FITTING = {"miss": {"r": 4}, "prompt": {"l": 4}, "road": {"g": 8}}
FROM_STORED = {"adapter_fusion", "lora_mix"}
"""Rules that start from other deltas; their nodes are those of rules that are here."""
FOR_MIXTURES = {"experts_lora"}


@pytest.mark.slow
@pytest.mark.parametrize("rule", sorted(rule_files().keys() - FROM_STORED))
def test_every_rule_of_the_library_runs_in_parts_and_sharded(
    alone: None, model_dir: Load, family_dir: Load, rule: str
) -> None:
    from torch.distributed.fsdp import fully_shard

    base = family_dir("mixtral") if rule in FOR_MIXTURES else model_dir("bert")
    model = moved(peftc.apply(rule, base, set=FITTING.get(rule), dtype=torch.float64))
    shards = copy.deepcopy(model)
    given = given_to(model) if rule in FOR_MIXTURES else batch()
    wanted = step(model, **given)
    model.activation_checkpointing_enable()
    assert_equal(step(model, **given), wanted)
    for module in (*(shards.model.layers if rule in FOR_MIXTURES else shards.bert.encoder.layer), shards):
        fully_shard(module)
    outputs, gradients = step(shards, **given)
    assert_equal((outputs, {name: value.full_tensor() for name, value in gradients.items()}), wanted)


@pytest.fixture(scope="module")
def family_dir(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    root = tmp_path_factory.mktemp("families")

    def directory(name: str) -> Path:
        from transformers import AlbertConfig, AlbertModel

        if name == "albert":
            sizes = {"hidden_size": 32, "num_attention_heads": 4, "intermediate_size": 64, "vocab_size": 99}
            cls: Any = AlbertModel
            config: Any = AlbertConfig(num_hidden_layers=3, embedding_size=16, hidden_dropout_prob=0.1, **sizes)
        else:
            cls, config = resolve(FAMILIES[name].raw_config(), name)
        cls(config).save_pretrained(root / name)
        return root / name

    return directory


@pytest.mark.slow
@pytest.mark.parametrize("name", OTHERS)
def test_families_run_in_parts(family_dir: Load, name: str) -> None:
    """Among them: a layer called three times, a bias that the first layer computes for all, two kinds of mask."""
    model = moved(peftc.apply("lora", family_dir(name), dtype=torch.float64))
    given = {"pixel_values": torch.randn(2, 3, 32, 32).double()} if name == "vit" else given_to(model)
    given = {key: value.clamp(max=60) if key.endswith("ids") else value for key, value in given.items()}
    wanted = step(model, **given)
    model.activation_checkpointing_enable()
    assert_equal(step(model, **given), wanted)
    layers = [unit for unit in called(model) if unit[-1].isdigit()]
    assert len(layers) == {"albert": 3, "t5": 4}.get(name, 2)


def test_a_block_that_is_only_a_list_is_marked_by_the_layers_in_it() -> None:
    model = torch.nn.ModuleDict({"stage": torch.nn.ModuleList([torch.nn.Linear(2, 2), torch.nn.Linear(2, 2)])})
    mark_layers(model, ["stage"], ["", "stage.0", "stage.1"], print, 1)
    assert [path for path, module in model.named_modules() if checkpoints(module)] == ["stage.0", "stage.1"]
    with pytest.raises(PeftcError, match=r"E041 .*ModuleDict cannot checkpoint activations"):
        mark_layers(model, ["stage"], [""], print, 1)


def graph_of(*places: str) -> list[fx.Node]:
    """A chain of nodes, each made in the call that its place names: "a", or "a@1" for the second call."""
    graph = fx.Graph()
    node = graph.placeholder("x")
    made = []
    for place in places:
        node = graph.call_function(torch.ops.aten.neg.default, (node,))
        stack = {part: (part.partition("@")[0], object) for part in place.split("/") if part}
        node.meta["nn_module_stack"] = stack
        made.append(node)
    return made


def cuts(nodes: list[fx.Node], units: str, inserted: Iterator[int] | tuple[int, ...] = ()) -> list[tuple[str, int]]:
    found = slices(nodes, {unit: unit for unit in units}, {nodes[index] for index in inserted})
    assert [node for part in found for node in part.nodes] == nodes
    return [(part.unit, len(part.nodes)) for part in found]


def test_calls_are_cut_where_they_begin_and_end() -> None:
    assert cuts(graph_of("", "a", "", "a", "a@1", "b", ""), "ab") == [("", 1), ("a", 3), ("a", 1), ("b", 1), ("", 1)]
    assert cuts(graph_of("a", "a/c", "a"), "ac") == [("a", 3)]
    inside = slices(nodes := graph_of("a", "a/c", "a"), {"a": "a", "c": "c"}, ())[0].parts
    assert [(part.unit, part.nodes) for part in inside] == [("", (nodes[0],)), ("c", (nodes[1],)), ("", (nodes[2],))]


def test_inserted_nodes_stay_with_their_call_where_they_are_beside_it() -> None:
    assert cuts(graph_of("a", "a", "a", "b"), "ab", (0, 2)) == [("a", 3), ("b", 1)]
    assert cuts(graph_of("a", "b", "a", "b"), "ab", (2,)) == [("a", 1), ("b", 3)]


def test_what_a_delta_computes_ahead_of_its_call_moves_into_it() -> None:
    graph = fx.Graph()
    weight, x = graph.placeholder("weight"), graph.placeholder("x")
    new = graph.call_function(torch.ops.aten.neg.default, (weight,))
    drawn = graph.call_function(torch.ops.aten.rand_like.default, (weight,))
    before = graph.call_function(torch.ops.aten.neg.default, (x,))
    inside = graph.call_function(torch.ops.aten.mul.Tensor, (before, new))
    last = graph.call_function(torch.ops.aten.mul.Tensor, (inside, drawn))
    for node in (new, drawn, inside, last):
        node.meta["nn_module_stack"] = {"a": ("a", object)}
    found = slices([new, drawn, before, inside, last], {"a": "a"}, {new, drawn})
    assert [(part.unit, part.nodes) for part in found] == [("", (drawn, before)), ("a", (new, inside, last))]


def test_a_call_that_begins_before_another_ends_is_an_error() -> None:
    with pytest.raises(PeftcError, match=r"E041 error: .*`b` begins .* before `a` ends"):
        cuts(graph_of("a", "b", "a"), "ab")


def test_a_layer_that_writes_into_its_input_is_not_computed_again() -> None:
    graph = fx.Graph()
    x = graph.placeholder("x")
    own = graph.call_function(torch.ops.aten.neg.default, (x,))
    fine = graph.call_function(torch.ops.aten.add_.Tensor, (own, 1))
    view = graph.call_function(torch.ops.aten.view.default, (x, [-1]))
    wrong = graph.call_function(torch.ops.aten.add_.Tensor, (view, 1))
    cut = [Slice("here", (own, fine)), Slice("layer", (view, wrong))]
    graph.output((fine, wrong))
    parts = compiled(cut, [x], [fine, wrong], {})
    layers: Any = {"here": torch.nn.Identity(), "layer": torch.nn.Identity()}
    for layer in layers.values():
        mark_layers(layer, [""], [""], lambda run, *args: run(*args), 1)
    with pytest.raises(
        PeftcError, match=r"E041 error: `layer` writes into a buffer or an input of its own \(at add__tensor_1\)"
    ):
        parts({}, [torch.ones(2)], layers.__getitem__)
    mark_layers(layers["layer"], [""], [""], print, 0)
    found = parts({}, [torch.ones(2)], layers.__getitem__)
    assert [value.tolist() for value in found] == [[0.0, 0.0], [2.0, 2.0]]
