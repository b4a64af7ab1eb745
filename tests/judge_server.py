"""A judge on this machine: a real HTTP server that speaks the OpenAI protocol, scripted per question."""

from __future__ import annotations

import contextlib
import json
import re
import socket
import struct
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

Answer = tuple[int, dict[str, str], str]


class DroppedError(Exception):
    """A script raises it to cut the connection, without a word or in the middle of the answer."""

    def __init__(self, sent: bytes = b"") -> None:
        self.sent = sent


class DrippedError(Exception):
    """A script raises it to send blanks, one by one, until the client has gone."""


class _Server(ThreadingHTTPServer):
    request_queue_size = 512  # a burst of connections must not wait for the kernel to try again
    daemon_threads = True

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that has gone is no news."""


class JudgeServer:
    """An OpenAI-compatible endpoint: `script[question]` answers, given the record and how often it was asked.

    `otherwise` answers what has no script.
    """

    def __init__(self) -> None:
        self.script: dict[str, Callable[[dict[str, Any], int], Answer]] = {}
        self.otherwise: Callable[[dict[str, Any], int], Answer] = lambda record, attempt: usual_answer(record)
        self.asked: Counter[str] = Counter()
        self.bodies: list[dict[str, Any]] = []
        self.authorization: set[str | None] = set()
        self.active = self.most_active = 0
        self.closing = threading.Event()  # set when the server ends: scripts that hang wait for it
        self._lock = threading.Lock()
        server = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                try:
                    status, headers, text = server.answer(body, self.headers["Authorization"])
                except DroppedError as dropped:
                    self.wfile.write(dropped.sent)
                    # Closed with a reset, as when a process dies.
                    self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                    return
                except DrippedError:
                    self.drip()
                    return
                self.send_response(status)
                for name, value in {"Content-Type": "application/json", **headers}.items():
                    self.send_header(name, value)
                self.send_header("Content-Length", str(len(text.encode())))
                self.end_headers()
                with contextlib.suppress(OSError):  # a client that timed out has gone
                    self.wfile.write(text.encode())

            def drip(self) -> None:
                self.send_response(200)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", "1000000")
                self.end_headers()
                with contextlib.suppress(OSError):
                    while not server.closing.wait(0.02):
                        self.wfile.write(b" ")

            def log_message(self, format: str, *args: Any) -> None:
                pass

        self.http = _Server(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.http.server_port}/v1"

    def answer(self, body: dict[str, Any], authorization: str | None) -> Answer:
        record = record_of(body)
        question = record["question"]
        with self._lock:
            self.bodies.append(body)
            self.authorization.add(authorization)
            self.asked[question] += 1
            attempt = self.asked[question]
            self.active += 1
            self.most_active = max(self.active, self.most_active)
        try:
            return self.script.get(question, self.otherwise)(record, attempt)
        finally:
            with self._lock:
                self.active -= 1


@contextlib.contextmanager
def running_server() -> Iterator[JudgeServer]:
    judge_server = JudgeServer()
    thread = threading.Thread(target=judge_server.http.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    try:
        yield judge_server
    finally:
        judge_server.closing.set()
        judge_server.http.shutdown()
        thread.join()
        judge_server.http.server_close()


def record_of(body: dict[str, Any]) -> dict[str, Any]:
    """The record between the delimiters of the first user message, of which there must be one pair."""
    text = body["messages"][1]["content"][-1]["text"]
    found = re.fullmatch(r"<record>\n([^<>]*)\n</record>", text)
    assert found, text
    return json.loads(found[1])


def completion(content: str | None, *, usage: dict[str, Any] | None = None, **choice: Any) -> Answer:
    message = {"role": "assistant", "content": content} | choice.pop("message", {})
    entry = {"index": 0, "finish_reason": "stop", "message": message} | choice
    body = {"id": "1", "object": "chat.completion", "created": 0, "model": "judge-1", "choices": [entry]}
    return 200, {}, json.dumps(body | ({"usage": usage} if usage else {}))


def verdict_text(record: dict[str, Any], steps: int | None = None) -> str:
    """Odd steps are aligned; the reason repeats the step."""
    entries = [
        {"index": i, "reason": step["text"], "gold_alignment": i % 2 == 1, "answer_contribution": False}
        for i, step in enumerate(record["steps"], start=1)
    ]
    return json.dumps({"steps": entries if steps is None else (entries * 3)[:steps]})


def verdict(record: dict[str, Any], steps: int | None = None, **choice: Any) -> Answer:
    return completion(verdict_text(record, steps), **choice)


def answer_verdict(correct: object, reason: str = "") -> Answer:
    return completion(json.dumps({"reason": reason, "correct": correct}))


def usual_answer(record: dict[str, Any]) -> Answer:
    """Of steps, `verdict`; of an answer, that it is correct when it is the gold one."""
    if "steps" in record:
        return verdict(record)
    return answer_verdict(record["model_answer"] == record["gold_answer"])
