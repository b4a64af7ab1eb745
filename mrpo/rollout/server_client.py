"""HTTP to one vLLM server: plain requests, streamed answers, calls of its workers. One connection a request."""

from __future__ import annotations

import http.client
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from urllib.parse import urlsplit

from mrpo.errors import UserError
from mrpo.rollout.weight_group import own_address

_CONNECT_TIMEOUT = 10.0  # seconds
_REFUSALS = (400, 401, 403, 404, 405, 413, 422)


class ServerError(RuntimeError):
    """The server answered, but it failed."""


class RefusedError(ServerError):
    """The server refuses the request, and would again."""


class Server:
    """The server at `url`; `requests` counts those under way, `model` is the name it serves its model under, and
    `workers` says how many processes hold it.

    Args:
        timeout: seconds without a word from the server.

    Raises:
        UserError: `url` is not one.
    """

    def __init__(self, url: str, timeout: float) -> None:
        parts = urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise UserError(f"rollout.servers: {url} is no URL; write http://host:port")
        self.url = url.rstrip("/").removesuffix("/v1")
        self.requests = 0
        self.model = ""
        self.workers = 0
        self._parts = urlsplit(self.url)
        self._timeout = timeout

    def own_address(self) -> str:
        """The address of this host on the way to the server. Raises OSError as `get`."""
        return own_address(self._parts.hostname or "", self._parts.port or 80)

    def get(self, path: str) -> Any:
        """The JSON answer to a GET.

        Raises:
            OSError: no connection.
            ServerError: any status but 200.
            ValueError: the answer is not JSON.
        """
        with self._answer("GET", path, None) as answer:
            return json.loads(answer.read())

    def post(self, path: str, content: dict[str, Any] | None = None) -> Any:
        """The JSON answer to a POST, None for an empty one. Raises as `get`."""
        with self._answer("POST", path, content) as answer:
            body = answer.read()
            return json.loads(body) if body else None

    def stream(self, path: str, content: dict[str, Any]) -> Iterator[dict[str, Any]]:
        """The server-sent events of a POST up to "[DONE]". Raises as `get`."""
        with self._answer("POST", path, content) as answer:
            for line in answer:
                data = line.decode().strip().removeprefix("data:").strip()
                if data == "[DONE]":
                    return
                if not data:
                    continue
                event = json.loads(data)
                if "error" in event:
                    raise ServerError(f"{path}: {_message(event)}")
                yield event

    def call(self, method: str, *arguments: str) -> list[Any]:
        """The answers of all workers to a method of their extension class. Raises as `get`."""
        answer = self.post("/collective_rpc", {"method": method, "args": list(arguments)})
        return answer["results"] if answer else []

    def reset_caches(self) -> None:
        """Forgets keys and values of prompts, image features, and processed images. Raises as `get`."""
        answer = self.post("/reset_prefix_cache")
        if answer and not answer.get("success", True):
            raise ServerError("its prefix cache is in use: does another client send requests?")
        self.post("/reset_encoder_cache")
        self.post("/reset_mm_cache")

    @contextmanager
    def _answer(self, verb: str, path: str, content: dict[str, Any] | None) -> Iterator[http.client.HTTPResponse]:
        kind = http.client.HTTPSConnection if self._parts.scheme == "https" else http.client.HTTPConnection
        connection = kind(self._parts.hostname or "", self._parts.port, timeout=_CONNECT_TIMEOUT)
        headers = {"Content-Type": "application/json"}
        if key := os.environ.get("VLLM_API_KEY"):
            headers["Authorization"] = f"Bearer {key}"
        try:
            connection.connect()
            connection.sock.settimeout(self._timeout)
            connection.request(verb, self._parts.path + path, json.dumps(content) if content else None, headers)
            answer = connection.getresponse()
            if answer.status != http.client.OK:
                kind_of_error = RefusedError if answer.status in _REFUSALS else ServerError
                raise kind_of_error(f"{path}: status {answer.status}: {_message(answer.read())}")
            yield answer
        except http.client.HTTPException as error:
            raise ConnectionError(f"{path}: {error!r}") from error
        finally:
            connection.close()


def _message(answer: Any) -> str:
    """What an error answer says, at most 500 characters of it."""
    try:
        parsed = json.loads(answer) if isinstance(answer, bytes) else answer
        error = parsed.get("error", parsed)
        text = error.get("message", error) if isinstance(error, dict) else error
    except (ValueError, AttributeError):
        text = answer.decode(errors="replace")
    return str(text)[:500]
