"""The judge check against a real HTTP server, and against none."""

from __future__ import annotations

import json
import socket
import threading
from collections.abc import Iterator
from dataclasses import asdict
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

from mrpo.doctor import judge as judge_module
from mrpo.doctor.check import Check
from mrpo.doctor.judge import check_judge
from mrpo.settings import load_config

KEY = "sk-secret-7"


class ModelServer:
    """Answers GET /v1/models with `status` and `body`; refuses any other key than KEY if `guarded`."""

    def __init__(self) -> None:
        self.status, self.body = 200, json.dumps({"object": "list", "data": [{"id": "judge-1", "object": "model"}]})
        self.guarded = False
        self.silent = False
        self.released = threading.Event()
        server = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                if server.silent:
                    server.released.wait(timeout=30)
                refused = server.guarded and self.headers["Authorization"] != f"Bearer {KEY}"
                status = 401 if refused else server.status if self.path == "/v1/models" else 404
                # Endpoints echo the key that they refuse.
                body = json.dumps({"error": {"message": self.headers["Authorization"]}}) if refused else server.body
                self.send_response(status)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body.encode())

            def log_message(self, format: str, *args: Any) -> None:
                pass

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.http.server_port}/v1"


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModelServer]:
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setenv("JUDGE_KEY", KEY)
    models = ModelServer()
    thread = threading.Thread(target=models.http.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    yield models
    models.released.set()
    models.http.shutdown()
    thread.join()
    models.http.server_close()


def check(url: str | None, *settings: str) -> Check:
    given = [] if url is None else [f"judge.base_url={url}"]
    config = load_config(
        None, ["judge.kind=openai", "judge.model=judge-1", "judge.api_key_env=JUDGE_KEY", *given, *settings]
    )
    found = check_judge(config)
    assert KEY not in json.dumps(asdict(found))
    return found


def test_an_endpoint_that_answers(server: ModelServer) -> None:
    server.guarded = True
    assert check(server.url) == Check("judge", "ok", f"judge-1 at {server.url}")


def test_an_endpoint_without_that_model(server: ModelServer) -> None:
    found = check(server.url, "judge.model=judge-2")
    assert (found.state, found.fact) == ("warning", f"{server.url} does not list judge-2; it lists judge-1")


def test_a_refused_key(server: ModelServer, monkeypatch: pytest.MonkeyPatch) -> None:
    server.guarded = True
    monkeypatch.setenv("JUDGE_KEY", f"{KEY}-old")
    found = check(server.url)
    assert found.state == "missing"
    assert found.fact == f"{server.url} refuses the key in JUDGE_KEY (401)"
    assert found.remedy == "export JUDGE_KEY=KEY"


def test_no_key_where_one_is_wanted(server: ModelServer, monkeypatch: pytest.MonkeyPatch) -> None:
    server.guarded = True
    monkeypatch.delenv("JUDGE_KEY")
    assert check(server.url).fact == f"{server.url} wants a key, and there is none in JUDGE_KEY (401)"


def test_no_key_for_openai_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("JUDGE_KEY", raising=False)
    found = check(None)
    assert (found.state, found.remedy) == ("missing", "export JUDGE_KEY=KEY")
    assert "JUDGE_KEY is not set" in found.fact


def test_a_closed_port(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))  # bound and not listening: connections are refused
        found = check(f"http://127.0.0.1:{unused.getsockname()[1]}/v1")
    assert found.state == "missing"
    assert "cannot be reached" in found.fact


def test_an_endpoint_that_says_nothing(server: ModelServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(judge_module, "PATIENCE", 0.1)
    server.silent = True
    found = check(server.url)
    assert found.state == "missing"
    assert "cannot be reached" in found.fact


def test_a_wrong_path_is_a_warning(server: ModelServer) -> None:
    found = check(server.url.removesuffix("/v1"))
    assert found.state == "warning"
    assert "status 404" in found.fact


@pytest.mark.parametrize("body", ["<html>Hello</html>", "{}", "[]", '{"data": [{}]}', '{"data": 3}'])
def test_something_else_than_an_endpoint(body: str, server: ModelServer) -> None:
    server.body = body
    found = check(server.url)
    assert found.state in ("missing", "warning")
    assert found.remedy is not None


def test_secrets_in_the_address_are_not_printed(server: ModelServer) -> None:
    found = check(server.url.replace("http://", f"http://user:{KEY}@") + f"?token={KEY}")
    assert "127.0.0.1" in found.fact


def test_the_embedded_judge() -> None:
    assert check_judge(load_config()).state == "ok"
    found = check_judge(load_config(None, ["data.name=vqa_rad", "data.root=/data"]))
    assert found.state == "warning"
    assert "no medical judge" in found.fact
