"""A judge on this machine: a real HTTP server that speaks the OpenAI protocol, scripted per question."""

from __future__ import annotations

import contextlib
import json
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

Answer = tuple[int, dict[str, str], str]


class JudgeServer:
    """An OpenAI-compatible endpoint: `script[question]` answers, given the record and how often it was asked."""

    def __init__(self) -> None:
        self.script: dict[str, Callable[[dict[str, Any], int], Answer]] = {}
        self.asked: Counter[str] = Counter()
        self.bodies: list[dict[str, Any]] = []
        self.authorization: set[str | None] = set()
        self.active = self.most_active = 0
        self._lock = threading.Lock()
        server = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                status, headers, text = server.answer(body, self.headers["Authorization"])
                self.send_response(status)
                for name, value in {"Content-Type": "application/json", **headers}.items():
                    self.send_header(name, value)
                self.send_header("Content-Length", str(len(text.encode())))
                self.end_headers()
                with contextlib.suppress(BrokenPipeError):  # a client that timed out has gone
                    self.wfile.write(text.encode())

            def log_message(self, format: str, *args: Any) -> None:
                pass

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.http.server_port}/v1"

    def answer(self, body: dict[str, Any], authorization: str | None) -> Answer:
        record = json.loads(body["messages"][1]["content"][-1]["text"])
        question = record["question"]
        with self._lock:
            self.bodies.append(body)
            self.authorization.add(authorization)
            self.asked[question] += 1
            attempt = self.asked[question]
            self.active += 1
            self.most_active = max(self.active, self.most_active)
        try:
            return self.script.get(question, lambda record, _: usual_answer(record))(record, attempt)
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
        judge_server.http.shutdown()
        thread.join()
        judge_server.http.server_close()


def completion(content: str | None) -> Answer:
    choice = {"index": 0, "finish_reason": "stop", "message": {"role": "assistant", "content": content}}
    body = {"id": "1", "object": "chat.completion", "created": 0, "model": "judge-1", "choices": [choice]}
    return 200, {}, json.dumps(body)


def verdict(record: dict[str, Any], steps: int | None = None) -> Answer:
    """Odd steps are aligned; the reason repeats the step."""
    entries = [
        {"index": i, "reason": step["text"], "gold_alignment": i % 2 == 1, "answer_contribution": False}
        for i, step in enumerate(record["steps"], start=1)
    ]
    return completion(json.dumps({"steps": entries if steps is None else (entries * 3)[:steps]}))


def answer_verdict(correct: object, reason: str = "") -> Answer:
    return completion(json.dumps({"reason": reason, "correct": correct}))


def usual_answer(record: dict[str, Any]) -> Answer:
    """Of steps, `verdict`; of an answer, that it is correct when it is the gold one."""
    if "steps" in record:
        return verdict(record)
    return answer_verdict(record["model_answer"] == record["gold_answer"])
