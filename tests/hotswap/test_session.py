"""`peftc.ort.Session`: adapters by name at each run, each equal to torch, and refused where they do not fit."""

from __future__ import annotations

import threading
from pathlib import Path

import numpy as np
import pytest

from hotswap.conftest import ADAPTERS, Served
from hotswap.support import answer, batch, difference
from peftc.diagnostics import PeftcError
from peftc.ort import Session, read_adapter
from peftc.ort.adapters import write_adapter

CLOSE = 1e-5


@pytest.fixture(scope="module")
def session(served: Served) -> Session:
    session = Session(served.directory)
    for name in session.available:
        session.load(name)
    return session


@pytest.mark.parametrize("name", [None, *ADAPTERS])
def test_a_run_with_an_adapter_answers_as_torch_with_its_deltas(
    served: Served, session: Session, name: str | None
) -> None:
    model = served.torch(name)
    for rows, length in ((1, 7), (3, 12)):
        inputs = batch(rows, length, session.inputs)
        assert difference(session.run(inputs, name)["last_hidden_state"], answer(model, inputs)) < CLOSE


def test_adapters_differ_from_the_base_and_from_each_other(session: Session) -> None:
    inputs = batch(2, 9, session.inputs)
    answers = [session.run(inputs, name)["last_hidden_state"] for name in (None, *ADAPTERS)]
    for i, one in enumerate(answers):
        for other in answers[i + 1 :]:
            assert difference(one, other) > 1e-2


def test_every_adapter_is_its_own_after_switching_back_and_forth(session: Session) -> None:
    inputs = batch(2, 9, session.inputs)
    first = {name: session.run(inputs, name)["last_hidden_state"] for name in (None, *ADAPTERS)}
    for name in (*reversed(ADAPTERS), None, *ADAPTERS):
        assert np.array_equal(session.run(inputs, name)["last_hidden_state"], first[name])


def test_threads_that_share_a_session_each_get_their_adapter(session: Session) -> None:
    inputs = batch(2, 9, session.inputs)
    wanted = {name: session.run(inputs, name)["last_hidden_state"] for name in ADAPTERS}
    wrong: list[str] = []

    def ask(name: str) -> None:
        for _ in range(20):
            if not np.array_equal(session.run(inputs, name)["last_hidden_state"], wanted[name]):
                wrong.append(name)
                return

    threads = [threading.Thread(target=ask, args=(name,)) for name in ADAPTERS]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_two_adapters_of_other_structures_run_together(served: Served, session: Session) -> None:
    inputs = batch(2, 9, session.inputs)
    both = session.run(inputs, ["wide", "houlsby"])["last_hidden_state"]
    assert difference(both, session.run(inputs, "wide")["last_hidden_state"]) > 1e-2
    assert np.array_equal(both, session.run(inputs, ["houlsby", "wide"])["last_hidden_state"])


def test_an_adapter_may_be_replaced_and_unloaded(served: Served) -> None:
    session = Session(served.directory)
    inputs = batch(2, 9, session.inputs)
    session.load("current", served.directory / "wide.onnx_adapter")
    first = session.run(inputs, "current")["last_hidden_state"]
    session.load("current", served.directory / "rs.onnx_adapter")
    assert difference(session.run(inputs, "current")["last_hidden_state"], first) > 1e-2
    session.unload("current")
    assert session.loaded == ()
    with refused("E092", "no adapter `current`"):
        session.run(inputs, "current")


def test_outputs_may_be_chosen(session: Session) -> None:
    answers = session.run(batch(1, 5, session.inputs), "wide", outputs=["pooler_output"])
    assert list(answers) == ["pooler_output"]


def test_two_adapters_of_one_structure_are_refused_together(session: Session) -> None:
    with refused("E092", "`narrow` and `wide` both name"):
        session.run(batch(1, 5, session.inputs), ["narrow", "wide"])


def test_wrong_inputs_are_refused_with_what_the_model_takes(session: Session) -> None:
    inputs = batch(1, 5, session.inputs)
    with refused("E092", "`attention_mask` is missing"):
        session.run({"input_ids": inputs["input_ids"]})
    with refused("E092", "no input `input_idz`"):
        session.run({**inputs, "input_idz": inputs["input_ids"]})
    with refused("E092", "onnxruntime refuses"):
        session.run({**inputs, "input_ids": inputs["input_ids"].astype(np.float32)})
    with refused("E092", "ignores adapters"):
        session.run_with_iobinding(None)


def test_an_unknown_name_suggests_the_nearest(session: Session) -> None:
    with refused("E092", "did you mean `wide`"):
        session.run(batch(1, 5, session.inputs), "wyde")
    with refused("E091", "did you mean `wide`"):
        session.load("wyde")


def test_a_file_that_is_no_whole_adapter_is_refused(session: Session, served: Served, tmp_path: Path) -> None:
    whole = (served.directory / "wide.onnx_adapter").read_bytes()
    for content in (b"", b"no adapter at all" * 9, whole[: len(whole) // 2]):
        path = tmp_path / "bad.onnx_adapter"
        path.write_bytes(content)
        with refused("E091", "no whole adapter file"):
            session.load("bad", path)
    with refused("E091", "does not exist"):
        session.load("bad", tmp_path / "none.onnx_adapter")


def test_an_adapter_of_another_base_or_of_other_shapes_is_refused(
    session: Session, served: Served, tmp_path: Path
) -> None:
    number = read_adapter(served.directory / "wide.onnx_adapter").model
    name = "encoder.layer.0.attention.lora.lora.q."
    up, down = np.zeros((16, 2), np.float32), np.zeros((2, 16), np.float32)
    for tensors, model, message in (
        ({name + "A": down, name + "B": up}, number + 1, "another base"),
        ({name + "C": down}, number, "no input for"),
        ({name + "A": down[:, :8]}, number, "the model takes"),
        ({name + "A": down.astype(np.float64)}, number, "the model takes"),
        ({name + "A": down, name + "B": up[:, :1]}, number, "the model takes"),
    ):
        path = tmp_path / "other.onnx_adapter"
        write_adapter(path, tensors, model)
        with refused("E091", message):
            session.load("other", path)


def test_a_directory_without_optional_deltas_is_refused(served: Served, tmp_path: Path) -> None:
    with refused("E091", "holds no model.onnx"):
        Session(tmp_path)


def refused(code: str, message: str):
    return pytest.raises(PeftcError, match=f"(?s){code}.*{message}")
