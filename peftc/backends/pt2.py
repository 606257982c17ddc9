"""The torch.export backend: the folded graph as `model.pt2`, and compiled ahead of time as `model.aoti.pt2`.

    torch.export.load("merged/model.pt2").module()(input_ids=ids, attention_mask=mask)["logits"]
    torch._inductor.aoti_load_package("merged/model.aoti.pt2")(input_ids=ids, attention_mask=mask)["logits"]

Torch alone reads them: inputs are keywords, the output is a dictionary. Batch and sequence are symbolic. Weights are in
the archive, so writing one takes the memory of the model.
"""

from __future__ import annotations

import contextlib
import copy
import os
import shutil
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch.utils import _pytree as pytree

from peftc.backends.onnx import output_names, state_shapes
from peftc.diagnostics import fail
from peftc.frontend.trace import InputSpec, sample
from peftc.passes.set_mode import SetMode
from peftc.runtime.executor import move_to

if TYPE_CHECKING:
    from torch.export import ExportedProgram

    from peftc.backends.onnx_weights import Weights
    from peftc.ir.program import Program

ARCHIVE, PACKAGE = "model.pt2", "model.aoti.pt2"


def require_compiler() -> None:
    """Raise `PeftcError` E094 where there is no C++ compiler."""
    stated = os.environ.get("CXX")
    if not any(shutil.which(compiler) for compiler in ([stated] if stated else ["g++", "clang++"])):
        what = f"CXX names `{stated}`, which is not there" if stated else "there is no g++ or clang++"
        fail("E094", f"`--export aoti` compiles the model, and {what}", help="install a C++ compiler, or export pt2")


def emit(directory: Path, program: Program, specs: Mapping[str, InputSpec], weights: Weights) -> ExportedProgram:
    """Write `model.pt2`; returns what it holds. Changes `program`. Raises what `weights` does."""
    SetMode(training=False).apply_to(program.graph)
    move_to(program.graph, torch.device("cpu"))
    state = {
        name: torch.cat([block.reshape(-1) for block in weights.blocks(name, shape, dtype)]).reshape(shape)
        for name, (shape, dtype) in state_shapes(program).items()
    }
    with _quiet():
        from torch.export.passes import move_to_device_pass

        exported = move_to_device_pass(program.to_exported(state), "cpu")
        exported._module_call_graph = _with_names(exported.module_call_graph, output_names(program))
        exported.example_inputs = ((), {name: sample(spec, "cpu") for name, spec in specs.items()})
        torch.export.save(exported, directory / ARCHIVE)
    return exported


def _with_names(call_graph: list[Any], names: tuple[str, ...]) -> list[Any]:
    """The call graph with a dictionary in place of a class of transformers, which the reader need not have."""
    entries = list(call_graph)
    entries[0] = copy.copy(entries[0])
    entries[0].signature = copy.copy(entries[0].signature)
    entries[0].signature.out_spec = pytree.tree_structure(dict.fromkeys(names, 0))
    return entries


def compile_ahead(directory: Path, exported: ExportedProgram) -> None:
    """Compile the program into `model.aoti.pt2` for this machine's processor. Raises `PeftcError` E094."""
    from torch._inductor import aoti_compile_and_package
    from torch._inductor.exc import CppCompileError

    try:
        with _quiet():
            aoti_compile_and_package(exported, package_path=str(directory / PACKAGE))
    except CppCompileError as error:
        reason = str(error).strip().splitlines()[0]
        fail("E094", f"the C++ compiler does not compile the model: {reason}", help="export pt2, which needs none")


def load(path: Path) -> Any:
    """What was written, to be called with inputs by name."""
    with _quiet():
        if path.name == PACKAGE:
            return torch._inductor.aoti_load_package(str(path))
        return torch.export.load(path).module()


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
