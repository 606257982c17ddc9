"""Serve one base with many adapters over HTTP: each request names the adapter that answers it, or none for the base.

    peftc merge out-de out-fr --export onnx --adapters -o served
    python examples/serve_onnx.py served --port 8000

    GET  /adapters      {"adapters": ["out-de", "out-fr"]}
    POST /run           {"adapter": "out-de", "inputs": {"input_ids": [[101, 102]], "attention_mask": [[1, 1]]}}
                        {"outputs": {"logits": [[...]]}}

Needs onnxruntime and numpy alone: no torch. `outputs` in a request chooses among the model's outputs. A request that
cannot be answered gets status 400 and {"error": ...} with the reason. Ctrl-C and SIGTERM let the requests that are
being answered end, and take no others.
"""

from __future__ import annotations

import argparse
import json
import signal
import threading
from collections.abc import Sequence
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import numpy as np

from peftc.diagnostics import PeftcError
from peftc.ort import Session

LARGEST = 1 << 22
"""Bytes of a request."""


class RequestError(Exception):
    """What is wrong with a request, in words for who sent it."""


class Server(ThreadingHTTPServer):
    """A server over one session, which its threads share."""

    daemon_threads = False  # closing waits for the answers that are under way

    def __init__(self, address: tuple[str, int], session: Session) -> None:
        super().__init__(address, Handler)
        self.session = session


class Handler(BaseHTTPRequestHandler):
    """Reads one request, answers it in JSON."""

    timeout = 30
    server: Server

    def do_GET(self) -> None:
        if self.path == "/adapters":
            self.answer(200, {"adapters": list(self.server.session.loaded)})
        else:
            self.answer(404, {"error": f"there is no {self.path}; GET /adapters, POST /run"})

    def do_POST(self) -> None:
        try:
            asked = self.asked()
            if self.path != "/run":
                self.answer(404, {"error": f"there is no {self.path}; GET /adapters, POST /run"})
                return
            outputs = self.server.session.run(arrays(asked), adapter_of(asked), names(asked.get("outputs")))
        except RequestError as error:
            self.answer(400, {"error": str(error)})
        except PeftcError as error:
            self.answer(400, {"error": "; ".join(d.message for d in error.diagnostics)})
        else:
            self.answer(200, {"outputs": {name: value.tolist() for name, value in outputs.items()}})

    def asked(self) -> dict[str, Any]:
        """The request's JSON object. Raises `RequestError`."""
        length = self.headers.get("Content-Length", "")
        if not length.isdigit() or int(length) > LARGEST:
            raise RequestError(f"the request needs a Content-Length of at most {LARGEST} bytes")
        try:
            asked = json.loads(self.rfile.read(int(length)))
        except (ValueError, RecursionError) as error:
            raise RequestError("the request is no JSON") from error
        if not isinstance(asked, dict):
            raise RequestError("the request is no JSON object")
        if unknown := asked.keys() - {"adapter", "inputs", "outputs"}:
            raise RequestError(f"unknown key {min(unknown)}; a request has adapter, inputs and outputs")
        return asked

    def answer(self, status: int, document: dict[str, Any]) -> None:
        body = json.dumps(document).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:
        """Keep quiet; a service logs in front of this."""


def arrays(asked: dict[str, Any]) -> dict[str, np.ndarray]:
    """The inputs: lists of whole numbers become int64, of others float32."""
    inputs = asked.get("inputs")
    if not isinstance(inputs, dict) or not inputs:
        raise RequestError("`inputs` is an object of names and nested lists of numbers")
    found: dict[str, np.ndarray] = {}
    for name, value in inputs.items():
        try:
            array = np.asarray(value)
        except ValueError as error:
            raise RequestError(f"`{name}`: its rows differ in length") from error
        if array.dtype.kind not in "if":
            raise RequestError(f"`{name}` is no nested list of numbers")
        found[name] = array.astype(np.int64 if array.dtype.kind == "i" else np.float32)
    return found


def adapter_of(asked: dict[str, Any]) -> str | None:
    adapter = asked.get("adapter")
    if adapter is not None and not isinstance(adapter, str):
        raise RequestError("`adapter` is the name of one, or null for the base")
    return adapter


def names(outputs: Any) -> list[str] | None:
    if outputs is not None and (not isinstance(outputs, list) or not all(isinstance(name, str) for name in outputs)):
        raise RequestError("`outputs` is a list of names")
    return outputs or None


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Serve an export of `peftc merge --export onnx --adapters`.")
    parser.add_argument("directory")
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=8000, help="0 chooses a free one")
    chosen = parser.parse_args(arguments)
    try:
        session = Session(chosen.directory)
        for name in session.available:
            session.load(name)
    except PeftcError as error:
        parser.exit(2, f"{error}\n")
    with Server((chosen.host, chosen.port), session) as server:
        for number in (signal.SIGINT, signal.SIGTERM):  # from a thread: the loop cannot stop itself while it runs
            signal.signal(number, lambda *_: threading.Thread(target=server.shutdown).start())
        host, port = server.server_address[:2]
        print(f"serving {', '.join(session.loaded)} at http://{host}:{port}", flush=True)
        server.serve_forever(poll_interval=0.1)
    print("stopped", flush=True)


if __name__ == "__main__":
    main()
