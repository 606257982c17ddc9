"""`Program`: a traced model on its way through the passes.

It holds the torch.fx graph of a `torch.export.ExportedProgram`, in which parameters, buffers and constants are
placeholders under their state-dict names, and beside the graph what the passes learn and do: the site table and
the ledger of inserted deltas. Invariant: the placeholders come in the order parameters, buffers, constants, user
inputs, and `bindings` names the state-dict entry (or the user input) behind every one of them.

Passes change a program in place; the graph never holds a weight, so this costs no memory.
"""

from __future__ import annotations

import operator
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import fx
from torch.export.graph_signature import ExportGraphSignature, InputKind, InputSpec, TensorArgument

from peftc.ir.initial import Init

if TYPE_CHECKING:
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.export import ExportedProgram

    from peftc.ir.guards import Guards
    from peftc.ir.sites import Site

BindingKind = Literal["parameter", "buffer", "constant", "input"]

_KINDS: dict[InputKind, BindingKind] = {
    InputKind.PARAMETER: "parameter",
    InputKind.BUFFER: "buffer",
    InputKind.CONSTANT_TENSOR: "constant",
    InputKind.USER_INPUT: "input",
}


@dataclass(frozen=True, slots=True)
class Binding:
    """What a placeholder stands for: a state-dict entry or a user input, by name."""

    kind: BindingKind
    name: str


@dataclass(frozen=True, slots=True)
class DeltaParameter:
    """A parameter that a delta brings: its state-dict name, shape, dtype and how it starts."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    init: Init
    frozen: bool = False
    delta: str = ""
    lr: float = 1.0
    """What the base learning rate is multiplied by."""

    @property
    def numel(self) -> int:
        count = 1
        for size in self.shape:
            count *= size
        return count


@dataclass(slots=True)
class Insertion:
    """A ledger entry: one delta at one tap of one site, as it stands in the graph.

    `before` is h, `after` the composed h' that took its place, both in canonical layout; `x` and `dh` are the
    delta's input and output. `lowering` is "expression", "concat" or "gated" (attention over a prefix), "prepend"
    (prompt tokens), or "rewrite" (one tap of several that an entry of `rewrite` replaces together).
    """

    delta: str
    site: Site
    tap: str
    lowering: str
    before: fx.Node
    after: fx.Node
    x: fx.Node | None
    dh: fx.Node | None
    original: fx.Node
    """What stood at the tap, in the layout of the graph, and `written` what stands there now."""
    written: fx.Node
    nodes: tuple[fx.Node, ...]
    parameters: tuple[str, ...]
    group: object = None
    """What the entries of one `rewrite` at one site have in common; they may own nodes together."""
    held: frozenset[fx.Node] = frozenset()
    """Nodes of the carried values that it reads: they see h as it was, where they see it at all."""

    @property
    def reads(self) -> set[fx.Node]:
        """What its nodes read."""
        return {operand for node in self.nodes for operand in node.all_input_nodes}


@dataclass(slots=True)
class Carried:
    """What an entry of `carry` computes at one site; it stands in the graph, and replaces nothing.

    `nodes` are those of the value and of the carried values that it is computed from, `own` its own alone.
    """

    name: str
    site: Site
    node: fx.Node
    own: tuple[fx.Node, ...]
    nodes: frozenset[fx.Node]


@dataclass(slots=True)
class Program:
    """A traced model with its sites and its ledger. See the module docstring."""

    exported: ExportedProgram
    graph_module: fx.GraphModule
    bindings: dict[fx.Node, Binding]
    constants: dict[str, torch.Tensor]
    """Lifted constants of the trace that are in no state dict, with their values."""
    sites: tuple[Site, ...] = ()
    ledger: list[Insertion] = field(default_factory=list)
    delta_parameters: dict[str, DeltaParameter] = field(default_factory=dict)
    trainable: frozenset[str] = frozenset()
    """Names of the parameters that train."""
    tied: dict[str, str] = field(default_factory=dict)
    """A parameter that is another one under a second name, to the first name."""
    replaced: dict[fx.Node, fx.Node] = field(default_factory=dict)
    """A tap's node to the node that now carries its value."""
    replaced_at: dict[tuple[fx.Node, fx.Node], fx.Node] = field(default_factory=dict)
    """The same for a value replaced for one user only: (node, user) to the new operand."""
    carried: list[Carried] = field(default_factory=list)
    """Values that deltas read from layer to layer."""
    fixed: dict[str, int] = field(default_factory=dict)
    """Named axes of the inputs that are numbers in the graph, which then holds for these sizes only."""
    guards: Guards | None = None
    """What else the graph holds for: a loop over chunks of the tokens is right for one number of chunks."""

    @classmethod
    def from_exported(cls, exported: ExportedProgram) -> Program:
        module = exported.graph_module
        placeholders = [node for node in module.graph.nodes if node.op == "placeholder"]
        bindings = {
            node: Binding(_KINDS[spec.kind], spec.target if spec.target is not None else node.name)
            for node, spec in zip(placeholders, exported.graph_signature.input_specs, strict=True)
        }
        constants = {
            binding.name: value
            for binding in bindings.values()
            if binding.kind == "constant" and isinstance(value := exported.constants[binding.name], torch.Tensor)
        }
        return cls(exported, module, bindings, constants)

    @property
    def graph(self) -> fx.Graph:
        return self.graph_module.graph

    @property
    def fake_mode(self) -> FakeTensorMode:
        """The mode whose fake tensors carry the shapes of the graph."""
        for node in self.graph.nodes:
            value = node.meta.get("val")
            if isinstance(value, torch.Tensor) and hasattr(value, "fake_mode"):
                return value.fake_mode  # pyright: ignore[reportAttributeAccessIssue]
        raise RuntimeError("the graph carries no fake tensors")

    def placeholders(self, kind: BindingKind) -> dict[str, fx.Node]:
        """Placeholders of one kind, by name, in graph order."""
        return {b.name: node for node, b in self.bindings.items() if b.kind == kind}

    @property
    def inputs(self) -> tuple[str, ...]:
        """Names of the user inputs in graph order."""
        return tuple(self.placeholders("input"))

    @property
    def output_node(self) -> fx.Node:
        return self.graph.output_node()

    def current(self, node: fx.Node) -> fx.Node:
        """The node that now carries the value `node` had in the base graph."""
        while node in self.replaced:
            node = self.replaced[node]
        return node

    def carried_at(self, name: str, site: Site) -> Carried:
        """The value that an entry of `carry` has at a site; it is written before whatever reads it."""
        return next(carried for carried in self.carried if carried.name == name and carried.site is site)

    @property
    def inserted(self) -> set[fx.Node]:
        """Every node that deltas brought."""
        entries = {node for entry in self.ledger for node in entry.nodes}
        return entries.union(*(carried.own for carried in self.carried))

    def parameter_name(self, node: fx.Node) -> str | None:
        """The state-dict name behind a placeholder, or None when it is not a parameter."""
        binding = self.bindings.get(node)
        return binding.name if binding and binding.kind == "parameter" else None

    def add_parameter(self, parameter: DeltaParameter) -> fx.Node:
        """A placeholder for a new parameter, after the last parameter; the same node when it exists (shared)."""
        existing = self.placeholders("parameter").get(parameter.name)
        if existing is not None:
            return existing
        last = list(self.placeholders("parameter").values())[-1]
        # torch.fx writes code with names in lower case, in which `B` and `b` would be one variable.
        name = "p_" + "".join(c if c.isalnum() else "_" for c in parameter.name.lower())
        taken = {str(word) for node in self.bindings for word in (node.name, node.target)}
        while name in taken:
            name += "_"
        with self.graph.inserting_after(last):
            node = self.graph.placeholder(name)
        with self.fake_mode:
            node.meta["val"] = torch.empty(parameter.shape, dtype=parameter.dtype, device=last.meta["val"].device)
        bindings: dict[fx.Node, Binding] = {}
        for key, binding in self.bindings.items():
            bindings[key] = binding
            if key is last:
                bindings[node] = Binding("parameter", parameter.name)
        self.bindings = bindings
        self.delta_parameters[parameter.name] = parameter
        return node

    def drop_unused_deltas(self) -> None:
        """Take out the parameters of deltas that nothing reads any more."""
        for node, binding in list(self.bindings.items()):
            if binding.name in self.delta_parameters and not node.users:
                self.graph.erase_node(node)
                del self.bindings[node]
                del self.delta_parameters[binding.name]

    def resize(self, node: fx.Node, value: torch.Tensor) -> None:
        """Give a placeholder the shape and dtype of the tensor it will be bound to."""
        like = node.meta["val"]
        if tuple(like.shape) != tuple(value.shape) or like.dtype != value.dtype:
            with self.fake_mode:
                node.meta["val"] = torch.empty(value.shape, dtype=value.dtype, device=like.device)

    def propagate(self) -> None:
        """Recompute every fake value from the placeholders on."""
        from torch._dispatch.python import enable_python_dispatcher

        # some ops (baddbmm) know symbolic sizes in their Python kernels alone
        with enable_python_dispatcher(), self.fake_mode, torch.no_grad():
            for node in self.graph.nodes:
                if node.op == "call_function":
                    args, kwargs = fx.map_arg((node.args, node.kwargs), lambda operand: operand.meta["val"])
                    node.meta["val"] = node.target(*args, **kwargs)

    def to_exported(self, state: Mapping[str, torch.Tensor]) -> ExportedProgram:
        """An `ExportedProgram` of the graph as it stands, bound to `state` (every parameter and buffer)."""
        from torch._export.verifier import load_verifier
        from torch.export import ExportedProgram

        specs: list[InputSpec] = []
        kinds = {kind: input_kind for input_kind, kind in _KINDS.items()}
        persistent = dict.fromkeys(self.exported.graph_signature.buffers, True)
        persistent.update(dict.fromkeys(self.exported.graph_signature.non_persistent_buffers, False))
        for node, binding in self.bindings.items():
            node.meta["val"] = node.meta["val"].detach()  # a mask that needs a gradient rules out fused attention
            target = None if binding.kind == "input" else binding.name
            flag = persistent.get(binding.name, True) if binding.kind == "buffer" else None
            specs.append(InputSpec(kinds[binding.kind], TensorArgument(node.name), target, flag))
        signature = ExportGraphSignature(specs, self._output_specs())
        names = [b.name for b in self.bindings.values() if b.kind == "parameter"]
        held: dict[str, Any] = {name: torch.nn.Parameter(state[name], requires_grad=False) for name in names}
        constants: dict[str, Any] = dict(self.constants)
        for binding in self.bindings.values():
            if binding.kind == "buffer":
                (held if persistent[binding.name] else constants)[binding.name] = state[binding.name]
        return ExportedProgram(
            root=self.graph_module,
            graph=self.graph,
            graph_signature=signature,
            state_dict=held,
            range_constraints=self.exported.range_constraints,
            module_call_graph=self.exported.module_call_graph,
            example_inputs=None,
            constants=constants,
            verifiers=[load_verifier("TRAINING")],  # as it was traced: some models write into their own tensors
        )

    def _output_specs(self) -> list[Any]:
        from torch.export.graph_signature import ConstantArgument, OutputKind, OutputSpec

        arguments = [
            TensorArgument(result.name) if isinstance(result, fx.Node) else ConstantArgument("", result)
            for result in results(self.graph)
        ]
        return [OutputSpec(OutputKind.USER_OUTPUT, argument, None) for argument in arguments]


def is_call(node: object, *targets: object) -> bool:
    """Whether `node` is a call of one of `targets` (aten overloads or overload packets)."""
    if not isinstance(node, fx.Node) or node.op != "call_function":
        return False
    packet = getattr(node.target, "overloadpacket", None)
    return any(node.target is target or (packet is not None and packet is target) for target in targets)


def operand(node: fx.Node, index: int) -> fx.Node:
    """The argument of `node` at `index`, which is a node."""
    argument = node.args[index]
    if not isinstance(argument, fx.Node):
        raise TypeError(f"argument {index} of {node.format_node()} is no node")
    return argument


def results(graph: fx.Graph) -> Sequence[Any]:
    """What a graph returns: nodes, and plain numbers such as the sizes of feature maps."""
    found = graph.output_node().args[0]
    assert isinstance(found, (list, tuple))
    return found


def result_nodes(graph: fx.Graph) -> list[fx.Node]:
    """The nodes that a graph returns."""
    return [node for node in results(graph) if isinstance(node, fx.Node)]


def is_getitem(node: object) -> bool:
    return isinstance(node, fx.Node) and node.op == "call_function" and node.target is operator.getitem


def shape_of(node: fx.Node) -> tuple[Any, ...]:
    """The traced shape: ints, and SymInts for symbolic axes."""
    return tuple(node.meta["val"].shape)


def module_path(node: fx.Node) -> str:
    """The dotted path of the module whose forward made `node`, "" for the root."""
    stack = node.meta.get("nn_module_stack") or {}
    paths = [str(entry[0]) for entry in stack.values()]
    return paths[-1] if paths else ""
