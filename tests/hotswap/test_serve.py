"""examples/serve_onnx.py: requests at the same time, each by its own adapter, each as torch answers it."""

from __future__ import annotations

import importlib.util
import json
import signal
import subprocess
import sys
import threading
import urllib.error
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from hotswap.conftest import Served
from hotswap.support import answer, batch, difference
from peftc.ort import Session

EXAMPLE = Path(__file__).parents[2] / "examples" / "serve_onnx.py"


@pytest.fixture(scope="module")
def url(served: Served) -> Iterator[str]:
    """A server with two adapters, in a thread."""
    spec = importlib.util.spec_from_file_location("serve_onnx", EXAMPLE)
    assert spec is not None and spec.loader is not None
    example = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = example  # its annotations are read by name
    spec.loader.exec_module(example)
    session = Session(served.directory)
    for name in ("wide", "mam"):
        session.load(name)
    with example.Server(("127.0.0.1", 0), session) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
        thread.start()
        yield f"http://127.0.0.1:{server.server_address[1]}"
        server.shutdown()
        thread.join()


def ask(url: str, document: object) -> tuple[int, dict[str, Any]]:
    body = document if isinstance(document, bytes) else json.dumps(document).encode()
    try:
        with urllib.request.urlopen(urllib.request.Request(f"{url}/run", body), timeout=30) as response:
            return response.status, json.load(response)
    except urllib.error.HTTPError as error:
        with error:
            return error.code, json.load(error)


def refused(request: urllib.request.Request) -> int:
    """The status of a request that is refused."""
    with pytest.raises(urllib.error.HTTPError) as error:
        urllib.request.urlopen(request, timeout=30)
    error.value.close()
    return error.value.code


def test_requests_at_the_same_time_are_each_answered_by_their_adapter(served: Served, url: str) -> None:
    names = ("input_ids", "attention_mask")
    models = {name: served.torch(name) for name in ("wide", "mam", None)}
    asked = [(name, batch(1 + i % 3, 5 + i % 4, names, seed=i)) for i in range(8) for name in models]
    wanted = [answer(models[name], inputs) for name, inputs in asked]

    def reply(item: tuple[str | None, dict[str, np.ndarray]]) -> np.ndarray:
        name, inputs = item
        lists = {key: value.tolist() for key, value in inputs.items()}
        status, document = ask(url, {"adapter": name, "inputs": lists, "outputs": ["last_hidden_state"]})
        assert status == 200 and list(document["outputs"]) == ["last_hidden_state"]
        return np.asarray(document["outputs"]["last_hidden_state"], np.float32)

    with ThreadPoolExecutor(8) as pool:
        replies = list(pool.map(reply, asked))
    assert max(difference(one, other) for one, other in zip(replies, wanted, strict=True)) < 1e-5


GOOD = {"input_ids": [[5, 6]], "attention_mask": [[1, 1]]}


@pytest.mark.parametrize(
    ("document", "message"),
    [
        (b"{", "no JSON"),
        ([1], "no JSON object"),
        ({"adapter": "wide"}, "`inputs` is an object"),
        ({"adapter": "wyde", "inputs": GOOD}, "no adapter `wyde`"),
        ({"adapter": 3, "inputs": GOOD}, "`adapter` is the name"),
        ({"inputs": GOOD, "adaptor": "wide"}, "unknown key adaptor"),
        ({"inputs": {"input_ids": [[5, 6]]}}, "`attention_mask` is missing"),
        ({"inputs": {**GOOD, "input_ids": [[5, 6], [7]]}}, "rows differ in length"),
        ({"inputs": {**GOOD, "input_ids": "text"}}, "no nested list of numbers"),
        ({"inputs": {**GOOD, "input_ids": [[5, 2**70]]}}, "no nested list of numbers"),
        ({"inputs": {**GOOD, "input_ids": [[5, 10**6]]}}, "onnxruntime refuses"),
        ({"inputs": GOOD, "outputs": ["logits"]}, "no output `logits`"),
    ],
)
def test_a_bad_request_gets_400_and_the_reason(url: str, document: object, message: str) -> None:
    status, answered = ask(url, document)
    assert status == 400 and message in answered["error"]
    assert ask(url, {"inputs": GOOD})[0] == 200  # and the server goes on


def test_a_request_without_a_length_or_too_long_is_refused(url: str) -> None:
    request = urllib.request.Request(f"{url}/run", b"{}", {"Content-Length": str(1 << 40)})
    assert refused(request) == 400


def test_adapters_are_listed_and_other_paths_are_not_there(url: str) -> None:
    with urllib.request.urlopen(f"{url}/adapters", timeout=30) as response:
        assert json.load(response) == {"adapters": ["wide", "mam"]}
    assert refused(urllib.request.Request(f"{url}/weights")) == 404


@pytest.mark.slow
def test_the_service_starts_without_torch_and_stops_cleanly_on_sigterm(served: Served) -> None:
    code = (
        "import runpy, sys; sys.modules['torch'] = None; del sys.argv[0]; runpy.run_path(sys.argv[0], None, '__main__')"
    )
    command = [sys.executable, "-c", code, str(EXAMPLE), str(served.directory), "--port", "0"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        line = process.stdout.readline()
        assert ask(line.split()[-1], {"adapter": "rs", "inputs": GOOD})[0] == 200
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=20) == 0
        assert process.stdout.read() == "stopped\n"
