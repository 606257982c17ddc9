"""Traces on disk: one of the same model, inputs and versions is read back; anything else, or a damaged one, is made."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from transformers.exporters.exporter_dynamo import DynamoExporter

from peftc.frontend.trace import Skeleton, build_skeleton, default_inputs, trace
from peftc.ir.program import Program, module_path
from peftc.runtime.executor import Executor
from peftc.store.trace_cache import VARIABLE, TraceCache, key_of


def tiny(**changes: Any) -> Skeleton:
    sizes = {"vocab_size": 40, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = transformers.BertConfig(**{**sizes, "intermediate_size": 24, **changes})
    return build_skeleton(transformers.BertModel, config, torch.float64)


@pytest.fixture
def kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv(VARIABLE, str(tmp_path / "traces"))
    return tmp_path / "traces"


@pytest.fixture
def exports(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The classes that were traced, as they are."""
    seen: list[str] = []
    original = DynamoExporter.export

    def export(self: Any, model: Any, *args: Any, **kwargs: Any) -> Any:
        seen.append(type(model).__name__)
        return original(self, model, *args, **kwargs)

    monkeypatch.setattr(DynamoExporter, "export", export)
    return seen


def traced(skeleton: Skeleton) -> Program:
    return trace(skeleton, default_inputs(skeleton.model))


def described(program: Program) -> list[tuple[object, ...]]:
    return [
        (node.op, str(node.target), node.name, str(getattr(node.meta.get("val"), "shape", "")), module_path(node))
        for node in program.graph.nodes
    ]


def outputs(program: Program, skeleton: Skeleton) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    state = {
        name: torch.randn(value.shape, generator=generator, dtype=torch.float64)
        for name, value in skeleton.model.named_parameters()
    }
    ids = torch.randint(0, 40, (2, 5), generator=generator)
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    executor = Executor(program, training=False, device=torch.device("cpu"))
    return [value for value in executor.flat({**skeleton.buffers, **state}, inputs) if value is not None]


def test_a_kept_trace_is_the_trace(kept: Path, exports: list[str]) -> None:
    first = traced(tiny())
    second = traced(tiny())
    assert exports == ["BertModel"]
    assert described(first) == described(second)
    assert list(first.bindings.values()) == list(second.bindings.values())
    for one, other in zip(outputs(first, tiny()), outputs(second, tiny()), strict=True):
        assert torch.equal(one, other)
    assert kept.stat().st_mode & 0o777 == 0o700


@pytest.mark.parametrize("package", ["torch", "transformers", "peftc"])
def test_another_version_traces_anew(
    package: str, kept: Path, exports: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    traced(tiny())
    monkeypatch.setattr(sys.modules[package], "__version__", "99.0")  # transformers' module is not always the same
    traced(tiny())
    assert len(exports) == len(list(kept.iterdir())) == 2


def test_what_a_trace_depends_on_is_in_its_name() -> None:
    base = tiny()
    inputs = default_inputs(base.model)
    key = key_of(base.model, inputs, {})
    assert key == key_of(tiny().model, inputs, {})
    eager = tiny(attn_implementation="eager")
    single = build_skeleton(transformers.BertModel, base.config, torch.float32)
    others = [
        key_of(tiny(hidden_act="relu").model, inputs, {}),
        key_of(eager.model, inputs, {}),
        key_of(single.model, inputs, {}),
        key_of(tiny().model.eval(), inputs, {}),
        key_of(base.model, {"input_ids": inputs["input_ids"]}, {}),
        key_of(base.model, inputs, {"output_hidden_states": True}),
    ]
    assert len({key, *others}) == 1 + len(others)


def test_where_a_model_came_from_is_not() -> None:
    base, other = tiny(), tiny()
    other.config._name_or_path = "elsewhere"
    inputs = default_inputs(base.model)
    assert key_of(base.model, inputs, {}) == key_of(other.model, inputs, {})


def test_a_class_of_somebody_elses_is_not_kept() -> None:
    class Mine(transformers.BertModel):
        pass

    skeleton = build_skeleton(Mine, tiny().config)
    assert key_of(skeleton.model, default_inputs(skeleton.model), {}) is None


@pytest.mark.parametrize("damage", ["empty", "cut", "changed", "another format"])
def test_a_damaged_trace_is_made_again(damage: str, kept: Path, exports: list[str]) -> None:
    expected = described(traced(tiny()))
    (path,) = kept.iterdir()
    content = path.read_bytes()
    half = len(content) // 2
    path.write_bytes({
        "empty": b"",
        "cut": content[:half],
        "changed": content[:half] + bytes([content[half] ^ 1]) + content[half + 1 :],
        "another format": b"PK" + content,
    }[damage])  # fmt: skip
    assert described(traced(tiny())) == expected
    assert len(exports) == 2
    traced(tiny())
    assert len(exports) == 2, "the trace that was made again is not the one that is kept"


def test_a_place_that_cannot_be_written_to_keeps_nothing(
    tmp_path: Path, exports: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv(VARIABLE, str(tmp_path / "file" / "traces"))
    traced(tiny())
    traced(tiny())
    assert len(exports) == 2


def test_off_keeps_nothing(tmp_path: Path, exports: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(VARIABLE, "off")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    traced(tiny())
    assert exports
    assert not list(tmp_path.iterdir())


def test_without_the_variable_the_users_cache_directory_is_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv(VARIABLE)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert TraceCache.of_environment().directory == tmp_path / "peftc" / "traces"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert TraceCache.of_environment().directory == tmp_path / ".cache" / "peftc" / "traces"


def test_the_traces_used_least_recently_go_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(VARIABLE, str(tmp_path))
    skeleton = tiny()
    inputs = default_inputs(skeleton.model)
    traced(skeleton)
    (path,) = tmp_path.iterdir()
    size = path.stat().st_size
    exported = TraceCache(tmp_path).read(key_of(skeleton.model, inputs, {"use_cache": False}))
    assert exported is not None
    for age, name in enumerate("cba"):
        (tmp_path / f"{name}.trace").write_bytes(path.read_bytes())
        os.utime(tmp_path / f"{name}.trace", (age + 1, age + 1))
    path.unlink()
    TraceCache(tmp_path, limit=3 * size + size // 2).write("new", exported)
    assert {file.stem for file in tmp_path.iterdir()} == {"a", "b", "new"}
