"""A stand-in for vLLM's server: real HTTP on a local port, made-up tokens, failures on demand."""

from __future__ import annotations

import base64
import http.server
import json
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import safetensors.torch
import torch

from mrpo.rollout.weight_group import WeightGroup, find_store

WORKERS = 2

# The answer to a request for completions: a list of events, or a status.
Answer = list[dict[str, Any]] | int


class FakeServer:
    """Answers as `description` and `answer` say, and keeps what it was asked, by path."""

    def __init__(self, description: dict[str, Any], answer: Callable[[dict[str, Any]], Answer]) -> None:
        self.description = description
        self.answer = answer
        self.asked: list[tuple[str, dict[str, Any]]] = []
        self.weights: dict[str, torch.Tensor] = {}
        self.broken: set[str] = set()  # calls that fail
        self.groups: list[WeightGroup] = []
        self.stores: list[Any] = []
        self._http = http.server.ThreadingHTTPServer(("127.0.0.1", 0), _handler(self))
        self.url = f"http://127.0.0.1:{self._http.server_port}"

    @contextmanager
    def running(self) -> Iterator[FakeServer]:
        thread = threading.Thread(target=self._http.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            yield self
        finally:
            self._http.shutdown()
            self._http.server_close()
            thread.join()

    def count(self, path: str) -> int:
        return sum(asked == path for asked, _ in self.asked)

    def call(self, method: str, arguments: list[str]) -> Any:
        if method == "mrpo_describe":
            return self.description
        if method in self.broken:
            raise RuntimeError("made to fail")
        if method == "mrpo_find_store":
            host, port, size = arguments
            self.stores = [find_store(host, int(port), int(size)) for _ in range(WORKERS)]
            return None
        if method == "mrpo_join":
            # Two workers, as a server with tensor parallelism has: each is a member.
            first, size, seconds = int(arguments[0]), int(arguments[1]), float(arguments[2])
            with ThreadPoolExecutor(WORKERS) as pool:
                self.groups = list(pool.map(lambda i: self._join(i, first + i, size, seconds), range(WORKERS)))
            return None
        if method == "mrpo_is_member":
            return bool(self.groups)
        if method == "mrpo_receive_weights":
            with ThreadPoolExecutor(WORKERS) as pool:
                received = list(pool.map(lambda group: dict(group.receive()), self.groups))
            self.weights = received[0]
            assert all(torch.equal(received[1][name], tensor) for name, tensor in self.weights.items())
            return None
        position, content = arguments
        self.weights |= safetensors.torch.load(base64.b64decode(content))
        return position

    def _join(self, worker: int, rank: int, size: int, seconds: float) -> WeightGroup:
        store, device = self.stores[worker], torch.device("cpu")
        return WeightGroup(store, rank, size, device, address="127.0.0.1", seconds=seconds)


def _handler(server: FakeServer) -> type[http.server.BaseHTTPRequestHandler]:
    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self._send({"data": [{"id": "served-name"}]})

        def do_POST(self) -> None:
            content = json.loads(self.rfile.read(int(self.headers.get("Content-Length", 0))) or b"{}")
            server.asked.append((self.path, content))
            if self.path == "/collective_rpc":
                try:
                    self._send({"results": [server.call(content["method"], content["args"])] * WORKERS})
                except RuntimeError as error:
                    self._send({"error": {"message": str(error)}}, 500)
            elif self.path.startswith("/reset"):
                self._send({})
            else:
                self._stream(server.answer(content))

        def _send(self, content: dict[str, Any], status: int = 200) -> None:
            body = json.dumps(content).encode()
            self.send_response(status)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def _stream(self, answer: Answer) -> None:
            if isinstance(answer, int):
                self._send({"error": {"message": "made to fail"}}, answer)
                return
            self.send_response(200)
            self.end_headers()
            for event in answer:
                self.wfile.write(f"data: {json.dumps(event)}\n\n".encode())
            self.wfile.write(b"data: [DONE]\n\n")

        def log_message(self, *_: object) -> None:
            pass

    return Handler
