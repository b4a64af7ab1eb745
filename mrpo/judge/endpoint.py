"""Many questions to a chat model behind any OpenAI-compatible endpoint (OpenAI, vLLM, SGLang, ...).

Requests run concurrently up to a bound. The openai package retries what may pass (connection, time-out, 408, 409, 429,
5xx) and waits as long as Retry-After says; an answer that does not fit is asked for once more. Whatever still fails
makes that one request `Unjudged`, with the reason, and leaves the others alone.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar, cast

import openai

from mrpo.config import JudgeConfig
from mrpo.errors import UserError
from mrpo.records import Unjudged

LONGEST_RETRY_WAIT = 120.0  # seconds; the openai package does not wait longer than this before a further try
ASKS = 2  # an answer that does not fit the schema is asked for once more

Answer = TypeVar("Answer", covariant=True)


@dataclass(frozen=True)
class ChatRequest(Generic[Answer]):
    """One question to the model.

    `messages` are built when the request's turn comes, as encoded images are large; it may raise OSError. `parse` turns
    the text of the answer into what is wanted and raises ValueError, with the reason, where it does not fit.
    """

    messages: Callable[[], Sequence[Mapping[str, Any]]]
    response_format: Mapping[str, Any]
    parse: Callable[[str], Answer]


class Endpoint:
    """`config.model` at `config.base_url`. `identity` tells it from any other model and place.

    Raises:
        UserError: the environment variable `config.api_key_env` is not set; an endpoint of one's own needs none.
    """

    def __init__(self, config: JudgeConfig) -> None:
        key = os.environ.get(config.api_key_env, "")
        if not key and config.base_url is None:
            raise UserError(
                f"judge.kind=openai needs a key: set the environment variable {config.api_key_env} "
                "(judge.api_key_env), or judge.base_url for an endpoint without keys"
            )
        self._config = config
        self._key = key or "EMPTY"
        place = config.base_url or os.environ.get("OPENAI_BASE_URL") or "default"
        self.identity = f"{config.model} at {place}"

    def ask(self, requests: Sequence[ChatRequest[Answer]]) -> list[Answer | Unjudged]:
        """One result per request, in order."""
        return asyncio.run(self._ask_all(requests))

    async def _ask_all(self, requests: Sequence[ChatRequest[Answer]]) -> list[Answer | Unjudged]:
        config = self._config
        slots = asyncio.Semaphore(config.concurrency)
        async with openai.AsyncOpenAI(
            api_key=self._key, base_url=config.base_url, timeout=config.timeout, max_retries=config.retries
        ) as client:
            return await asyncio.gather(*(self._ask_one(client, slots, request) for request in requests))

    async def _ask_one(
        self, client: openai.AsyncOpenAI, slots: asyncio.Semaphore, request: ChatRequest[Answer]
    ) -> Answer | Unjudged:
        # The package's time-out is per read, so that a server that drips bytes could hold a request for ever.
        limit = ASKS * (self._config.retries + 1) * (self._config.timeout + LONGEST_RETRY_WAIT)
        async with slots:
            try:
                return await asyncio.wait_for(self._ask_until_it_fits(client, request), limit)
            except (TimeoutError, openai.OpenAIError, OSError) as error:
                return Unjudged(self._reason(error))

    async def _ask_until_it_fits(self, client: openai.AsyncOpenAI, request: ChatRequest[Answer]) -> Answer | Unjudged:
        messages = request.messages()
        reason = ""
        for _ in range(ASKS):
            try:
                response = await client.chat.completions.create(
                    model=self._config.model,
                    messages=cast(Any, messages),
                    response_format=cast(Any, request.response_format),
                )
                return request.parse(_content(response))
            except ValueError as error:
                reason = str(error)
        return Unjudged(reason)

    def _reason(self, error: Exception) -> str:
        """What went wrong in one short line; endpoints echo keys, so the key is cut out."""
        text = " ".join(str(error).split()).replace(self._key, "***")
        return f"{type(error).__name__}: {text[:200]}"


def _content(response: Any) -> str:
    """The text of an answer; servers that are not what they say can return any shape.

    Raises:
        ValueError: there is none.
    """
    try:
        content = response.choices[0].message.content
    except (AttributeError, IndexError, TypeError):
        content = None
    if not isinstance(content, str):
        raise ValueError("the endpoint returned no text")
    return content
