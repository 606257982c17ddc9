"""Blocks, layers and stacks: which transformer layer a site belongs to.

A block is the smallest repeated module (a path that ends in an index) around one self attention, and what stands
beside it in the same list, such as the state-space layers of a hybrid; without any attention, the first index in the
path. Blocks are numbered in graph order within their stack and tower: blocks whose
paths differ in nothing but indices are one tower, as the language and the vision model of LLaVA are two. A stack is the
encoder when its hidden states are what some cross attention attends to, or when nothing in its tower is causal.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from itertools import takewhile
from typing import Any

import torch
from torch import fx

from peftc.frontend.trace import LABELS
from peftc.ir.program import Program, is_call, module_path, result_nodes, shape_of
from peftc.ir.sites import Site, Tap, without_indices
from peftc.locate.walk import DROPOUT, NORMS, VIEWS, backward

aten = torch.ops.aten


def assign_blocks(program: Program, sites: list[Site]) -> list[Site]:
    """Fill in `block`, `layer`, `stack` of every site and return the block sites."""
    selves = [site for site in sites if site.kind == "attention" and site.variant == "self"]
    anchors = [site.path for site in selves] or [site.path for site in sites if site.kind == "ffn"]
    blocks = _block_paths(anchors or [site.path for site in sites])
    if anchors:
        blocks += _other_layers(blocks, [site.path for site in sites])
    for site in sites:
        site.block = next((block for block in blocks if _inside(site.path, block)), "")
    stack_of = _stacks(sites)
    for site in sites:
        site.stack = stack_of(site.anchor, site.path)
    counters: dict[tuple[str, str], int] = {}
    layers: dict[str, int] = {}
    stacks: dict[str, str] = {}
    for site in sites:
        if site.block and site.block not in layers:
            stack = (site.stack, site.tower)
            layers[site.block] = counters.get(stack, 0)
            stacks[site.block] = site.stack
            counters[stack] = layers[site.block] + 1

    def number(site: Site, block: str) -> None:
        site.layer = layers.get(block, -1)
        own = counters.get((stacks.get(block, ""), without_indices(block)))
        several = [count for (stack, _), count in counters.items() if stack == site.stack]
        site.dims.update(layer=site.layer, layers=own if own is not None else max(several, default=0))

    for site in sites:
        number(site, site.block)
    found = [_block_site(program, block, sites) for block in layers]
    for site in found:
        site.stack = stacks[site.path]
        number(site, site.path)
    return found


def place_in_blocks(program: Program, found: Mapping[fx.Node, Site]) -> None:
    """Fill in `block`, `layer`, `stack` of further sites of a located program, each under its output."""
    if not found:
        return
    blocks = {site.path: site for site in program.sites if site.kind == "block"}
    own = [site for site in program.sites if site.kind not in ("block", "model")]
    stack_of = _stacks(own)
    counts: dict[str, int] = {}
    for block in blocks.values():
        counts[block.stack] = max(counts.get(block.stack, 0), int(block.dims["layers"]))
    for node, site in found.items():
        site.block = next((path for path in blocks if _inside(site.path, path)), "")
        site.stack = stack_of(node, site.path)
        layers = counts.get(site.stack, 0)
        if site.block:
            own = blocks[site.block]
            site.layer, site.stack, layers = own.layer, own.stack, int(own.dims["layers"])
        site.dims.update(layer=site.layer, layers=layers)


def _inside(path: str, block: str) -> bool:
    return path == block or path.startswith(block + ".")


def _block_paths(paths: list[str]) -> list[str]:
    """For each anchor the shortest prefix ending in an index that holds no second anchor."""
    found: dict[str, None] = {}
    for path in paths:
        prefixes = [path[: match.end()] for match in re.finditer(r"(?<![^.])\d+(?=\.|$)", path)]
        single = [p for p in prefixes if sum(_inside(other, p) for other in set(paths)) == 1]
        if prefixes:
            found[single[0] if single else prefixes[-1]] = None
    return list(found)


def _other_layers(blocks: list[str], paths: list[str]) -> list[str]:
    """The layers of a hybrid that have no such anchor: what stands beside the blocks under another number."""
    lists = {block.rpartition(".")[0] for block in blocks}
    found: dict[str, None] = {}
    for path in paths:
        for match in re.finditer(r"(?<![^.])\d+(?=\.|$)", path):
            layer = path[: match.end()]
            beside = path[: match.start()].removesuffix(".") in lists
            if beside and not any(_inside(layer, block) or _inside(block, layer) for block in blocks):
                found[layer] = None
    return list(found)


def _stacks(sites: list[Site]) -> Callable[[fx.Node, str], str]:
    """Says for a node and the path of its site which stack it is in, by the attentions among `sites`."""
    crosses = [site for site in sites if site.variant == "cross"]
    memory: set[fx.Node] = set()
    if crosses:
        memory = set(backward([site.taps["ctx"].node for site in crosses], lambda node: node.op == "placeholder"))
    if crosses:
        return lambda node, _: "encoder" if node in memory else "decoder"
    causal = {without_indices(site.path): False for site in sites if site.kind == "attention"}
    causal.update({without_indices(site.path): True for site in sites if site.causal})

    def nearest(_: fx.Node, path: str) -> str:
        """By the attention with most of the path in common; outside of all towers the text that is written decides."""
        own = without_indices(path)
        shared = {tower: _in_common(own, tower) for tower in causal}
        most = max(shared.values(), default=0)
        return "decoder" if any(causal[tower] for tower, count in shared.items() if count == most) else "encoder"

    return nearest


def _in_common(one: str, other: str) -> int:
    """How many names two paths begin with together."""
    pairs = zip(one.split("."), other.split("."), strict=False)
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pairs))


def _block_site(program: Program, block: str, sites: list[Site]) -> Site:
    own = [site for site in sites if site.block == block]
    width = next((int(site.dims["d_model"]) for site in own if "d_model" in site.dims), None)
    inside = [node for node in program.graph.nodes if node.op == "call_function" and _inside(module_path(node), block)]
    members = set(inside)

    def hidden(node: fx.Node) -> bool:
        value = node.meta.get("val")
        return isinstance(value, torch.Tensor) and value.is_floating_point() and shape_of(node)[-1:] == (width,)

    leaving = [node for node in inside if hidden(node) and any(user not in members for user in node.users)]
    contexts = {site.taps["ctx"].node for site in own if site.variant == "cross"}
    entering: dict[fx.Node, None] = {}
    for node in inside:
        for operand in node.all_input_nodes:
            if operand not in members and operand.op != "placeholder" and hidden(operand) and operand not in contexts:
                entering[operand] = None
    taps: dict[str, Tap] = {}
    missing: dict[str, str] = {}
    if leaving:
        taps["out"] = Tap("out", leaving[-1])
    else:
        missing["out"] = "no hidden state leaves this block"
    stream = [node for node in entering if not is_call(node, *VIEWS)] or list(entering)
    if stream:
        taps["x"] = Tap("x", stream[0])
    dims: dict[str, int | bool] = {} if width is None else {"d_model": width}
    return Site("block", block, taps, dims, block=block, missing=missing)


def model_site(program: Program) -> Site:
    """The whole graph: the token embeddings and the first output."""
    taps: dict[str, Tap] = {}
    missing: dict[str, str] = {}
    ids = program.placeholders("input").get("input_ids")
    table = None if ids is None else _embedding_of(ids)
    if table is not None:
        taps["embeddings"] = Tap("embeddings", table)
    else:
        missing["embeddings"] = "this model does not embed `input_ids`"
    scores = [node for node in result_nodes(program.graph) if node.meta["val"].dim() > 0]
    if scores:
        taps["logits"] = Tap("logits", scores[0])
    dims: dict[str, int | bool] = {} if table is None else {"d_model": int(shape_of(table)[-1])}
    series = {} if ids is None else _sequence_taps(program, ids, taps)
    return Site("model", "", taps, dims, missing=missing, series=series)


_INPUTS = {
    "input_ids": "ids", "attention_mask": "mask", "token_type_ids": "types", "position_ids": "positions",
    "labels": "labels", LABELS: "labels",
}  # fmt: skip
_ALONG = {(1,): "outputs", (2, 3): "attentions", (3,): "cross_attentions"}
"""Results by the axes that are the sequence of `input_ids`."""


def _sequence_taps(program: Program, ids: fx.Node, taps: dict[str, Tap]) -> dict[str, tuple[Tap, ...]]:
    """Add the taps that depend on the length of the sequence; those that are several values come back whole.

    Results are taken as the caller gets them: what the model itself makes of them, a loss, stays.
    """
    length = shape_of(ids)[1]
    for name, node in program.placeholders("input").items():
        if name in _INPUTS and _axes_of(node, length) == (1,) and len(shape_of(node)) == 2:
            taps[_INPUTS[name]] = Tap(_INPUTS[name], node)
    found: dict[str, dict[fx.Node, Tap]] = {}
    for node in program.graph.nodes:
        fixed = is_call(node, aten.select.int) and node.args[1] == 1 and isinstance(node.args[2], int)
        if fixed and node.args[2] >= 0 and 1 in _axes_of(node.args[0], length):
            found.setdefault("pooled", {})[node] = Tap("pooled", node.args[0], user=node)
    for node in result_nodes(program.graph):
        kind = _ALONG.get(_axes_of(node, length))
        if kind is not None:
            found.setdefault(kind, {})[node] = Tap(kind, node, user=program.output_node)
    series = {name: tuple(several.values()) for name, several in found.items()}
    taps.update({name: several[0] for name, several in series.items()})
    return series


def _axes_of(node: fx.Node, length: Any) -> tuple[int, ...]:
    """The axes of a value that are `length` long whatever that is.

    Sample sizes tell them: each input has symbols of its own, and the sizes a trace is made with are distinct.
    """
    if isinstance(length, int) or not isinstance(node.meta.get("val"), torch.Tensor):
        return ()
    sizes = enumerate(shape_of(node))
    return tuple(i for i, size in sizes if not isinstance(size, int) and size.node.hint == length.node.hint)


def _embedding_of(ids: fx.Node) -> fx.Node | None:
    queue = [ids]
    while queue:
        node = queue.pop(0)
        for user in node.users:
            if is_call(user, aten.embedding.default) and user.args[1] is node:
                return user
            if is_call(user, *VIEWS, *DROPOUT, *NORMS):
                queue.append(user)
    return None
