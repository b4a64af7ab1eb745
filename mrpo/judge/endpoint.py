"""Many questions to a chat model behind any OpenAI-compatible endpoint (OpenAI, vLLM, SGLang, ...).

Requests run in the background, concurrently up to a bound. Each try has a limit of time in all, however slowly bytes
come; what may pass (connection, time-out, 408, 409, 429, 5xx) is tried again after a wait; an answer that does not fit
is asked for once more with word of what was wrong. An endpoint that fails many requests in a row is left alone for a
while. Whatever still fails makes that one request `Unjudged`, with the reason, and leaves the others alone.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import logging
import os
import random
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping, Sequence, Set
from concurrent.futures import Future
from contextlib import asynccontextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, Generic, TypeVar, cast
from urllib.parse import urlsplit

import openai

from mrpo.config import JudgeConfig
from mrpo.errors import UserError
from mrpo.judge.answer_text import chosen_text
from mrpo.judge.background import BackgroundLoop
from mrpo.judge.backoff import wait_before_retry
from mrpo.judge.breaker import CircuitBreaker, Turn
from mrpo.judge.images import PerPicture, image_digest, image_url
from mrpo.judge.stats import Tally
from mrpo.pictures import Picture
from mrpo.records import Unjudged

ASKS = 2  # an answer that does not fit the schema is asked for once more
LONGEST_QUOTE = 2_000  # characters of an unfit answer that the model is shown again

COUNTS = ("requests", "unjudged", "retries", "rate_limited", "repairs", "breaker_openings")
TOKENS = ("tokens_in", "tokens_cached", "tokens_out")

_log = logging.getLogger(__name__)

_FAILURES = (TimeoutError, openai.APIConnectionError, openai.APIStatusError)

Message = Mapping[str, Any]
Answer = TypeVar("Answer", covariant=True)


@dataclass(frozen=True)
class ChatRequest(Generic[Answer]):
    """One question to the model.

    `messages` are built when the request's turn comes, as encoded images are large; it may raise OSError. `parse` turns
    the text of the answer into what is wanted and raises ValueError, with the reason, where it does not fit. `group` is
    shared by requests whose messages begin alike.
    """

    messages: Callable[[], Sequence[Message]]
    response_format: Mapping[str, Any]
    parse: Callable[[str], Answer]
    group: str


def base_url_of(config: JudgeConfig) -> str | None:
    """The address of the endpoint: `judge.base_url`, or what OPENAI_BASE_URL says; None: the openai package's own."""
    return config.base_url or os.environ.get("OPENAI_BASE_URL") or None


def is_openai(base_url: str | None) -> bool:
    """Whether the endpoint is OpenAI's, which needs a key and takes its fields."""
    host = urlsplit(base_url).hostname if base_url else None
    return base_url is None or (host is not None and f".{host}".endswith(".openai.com"))


class Endpoint:
    """`config.model` at `base_url_of(config)`. `identity` tells it, and how it is asked, from any other.

    Args:
        sleep: what waits for some seconds before a retry.

    Raises:
        UserError: the environment variable `config.api_key_env` is not set; an endpoint of one's own needs none.
    """

    def __init__(self, config: JudgeConfig, *, sleep: Callable[[float], Awaitable[None]] = asyncio.sleep) -> None:
        key = os.environ.get(config.api_key_env, "")
        self._base_url = base_url_of(config)
        if not key and is_openai(self._base_url):
            raise UserError(
                f"judge.kind=openai needs a key: set the environment variable {config.api_key_env} "
                "(judge.api_key_env), or judge.base_url for an endpoint without keys"
            )
        self.config = config
        self._key = key or "EMPTY"
        self._sleep = sleep
        # Its own: the run's stream must not depend on when requests fail.
        self._random = random.Random()
        self._url_of = PerPicture(partial(image_url, max_pixels=config.max_image_pixels))
        self._digest_of = PerPicture(image_digest)
        self._held: set[str] = set()  # ids of images that the endpoint has
        self._tally = Tally()
        self._loop = BackgroundLoop("judge", self._connect)
        self._client: openai.AsyncOpenAI
        self._slots: asyncio.Semaphore
        self._breaker: CircuitBreaker
        asked = {"extra", "image_detail", "max_image_pixels", "count_in_schema"}
        changes = config.model_dump(mode="json", include=asked, exclude_defaults=True)
        self.identity = f"{config.model} at {self._base_url or 'default'} {json.dumps(changes, sort_keys=True)}"

    def submit(self, request: ChatRequest[Answer]) -> Future[Answer | Unjudged]:
        """Asks in the background. The future raises nothing that the endpoint does."""
        return self._loop.submit(self._ask(request))

    def image_part(self, image: Picture) -> dict[str, Any]:
        """The content part that shows `image`.

        Raises:
            OSError: the image cannot be read.
        """
        detail = {} if self.config.image_detail == "auto" else {"detail": self.config.image_detail}
        part: dict[str, Any] = {"type": "image_url", "image_url": {"url": self._url_of(image), **detail}}
        return part | {"uuid": self._digest_of(image)} if self.config.image_ids else part

    def stats(self) -> dict[str, float]:
        """Metrics since the last call: see `Tally.take`, and counts of requests, tokens and, with prices, USD."""
        metrics = self._tally.take((*COUNTS, *TOKENS))
        config = self.config
        if config.price_input is not None and config.price_output is not None:
            total, cached, out = (metrics[f"judge/{name}"] for name in TOKENS)
            price_cached = config.price_input if config.price_cached is None else config.price_cached
            cost = (total - cached) * config.price_input + cached * price_cached + out * config.price_output
            metrics["judge/cost_usd"] = cost / 1e6
        return metrics

    def close(self) -> None:
        """Ends the connections; requests under way become `Unjudged`."""
        self._loop.close()

    @asynccontextmanager
    async def _connect(self) -> AsyncIterator[None]:
        config = self.config
        self._slots = asyncio.Semaphore(config.concurrency)
        self._breaker = CircuitBreaker(
            config.breaker_failures, config.breaker_pause, config.breaker_patience, on_open=self._tell_that_it_is_down
        )
        async with openai.AsyncOpenAI(
            api_key=self._key, base_url=self._base_url, timeout=config.timeout, max_retries=0
        ) as self._client:
            yield

    async def _ask(self, request: ChatRequest[Answer]) -> Answer | Unjudged:
        try:
            async with self._slots:
                result = await self._ask_while_down(request)
        except asyncio.CancelledError:
            return Unjudged("the judge was closed before its verdict")
        self._tally.add(requests=1, unjudged=isinstance(result, Unjudged))
        return result

    async def _ask_while_down(self, request: ChatRequest[Answer]) -> Answer | Unjudged:
        """The result; that of a request which an outage ended is asked for again when the endpoint is back."""
        while True:
            async with self._breaker.turn() as turn:
                result = Unjudged(turn.refusal) if turn.refusal else await self._ask_in(turn, request)
            if turn.alive is not False or not self._breaker.is_waited_for:
                return result

    def _tell_that_it_is_down(self, reason: str) -> None:
        self._tally.add(breaker_openings=1)
        pause, patience = self.config.breaker_pause, self.config.breaker_patience
        _log.warning(
            "the judge's endpoint is down: %s; it is tried every %g s and, if it had answered before, waited for up to "
            "%g s (judge.breaker_pause, judge.breaker_patience)", reason, pause, patience
        )  # fmt: skip

    async def _ask_in(self, turn: Turn, request: ChatRequest[Answer]) -> Answer | Unjudged:
        began = time.perf_counter()
        try:
            async with _limit(self.config.deadline, "deadline"):
                result = await self._ask_until_it_fits(request)
            turn.alive = True
            return result
        except _FAILURES as error:
            turn.alive, turn.reason = not _is_down(error), self._reason(error)
            return Unjudged(turn.reason)
        except (openai.OpenAIError, OSError) as error:  # an image cannot be read: nothing is known of the endpoint
            return Unjudged(self._reason(error))
        finally:
            self._tally.took(began, time.perf_counter())

    async def _ask_until_it_fits(self, request: ChatRequest[Answer]) -> Answer | Unjudged:
        messages = [*request.messages()]
        for ask in range(ASKS):
            text = ""
            try:
                text = chosen_text(await self._send(messages, request))
                return request.parse(text)
            except (ValueError, RecursionError) as error:  # the latter: JSON nested without end
                reason = str(error)
            if ask + 1 < ASKS:
                self._tally.add(repairs=1)
                messages += _follow_up(text, reason)
        return Unjudged(reason)

    async def _send(self, messages: Sequence[Message], request: ChatRequest[Any]) -> Any:
        """The response to `messages`, without the bytes of images that the endpoint has by their id."""
        ids = {part["uuid"] for part in _parts(messages) if "uuid" in part}
        held = ids & self._held
        try:
            response = await self._try(_without_bytes(messages, held), request)
        except openai.BadRequestError:
            if not held:
                raise
            self._held -= held  # it has dropped them
            response = await self._try(messages, request)
        self._held |= ids
        return response

    async def _try(self, messages: Sequence[Message], request: ChatRequest[Any]) -> Any:
        """The response, after as many tries as it takes and `retries` allow."""
        config = self.config
        # Requests that begin alike should meet at one machine, and find there what it has read before.
        routing = {"prompt_cache_key": request.group} if is_openai(self._base_url) else {}
        for retry in itertools.count():
            try:
                async with _limit(config.timeout, "timeout"):
                    response = await self._client.chat.completions.create(
                        model=config.model,
                        messages=cast(Any, messages),
                        response_format=cast(Any, request.response_format),
                        extra_body=routing | config.extra,
                    )
                self._tally.add(**_usage(response))
                return response
            except _FAILURES as error:
                status = error.response if isinstance(error, openai.APIStatusError) else None
                self._tally.add(rate_limited=status is not None and status.status_code == 429)
                wait = wait_before_retry(retry, status.headers if status else {}, self._random.random())
                if retry == config.retries or wait is None or not _may_pass(error):
                    raise
            self._tally.add(retries=1)
            await self._sleep(wait)

    def _reason(self, error: Exception) -> str:
        """What went wrong in one short line; endpoints echo keys, so the key is cut out."""
        text = " ".join(str(error).split()).replace(self._key, "***")
        return f"{type(error).__name__}: {text[:200]}"


@asynccontextmanager
async def _limit(seconds: float, field: str) -> AsyncIterator[None]:
    try:
        async with asyncio.timeout(seconds) as limit:
            yield
    except TimeoutError:
        if not limit.expired():
            raise
        raise TimeoutError(f"timed out after {seconds:g} s (judge.{field})") from None


def _is_down(error: Exception) -> bool:
    """Whether a failed request speaks against the endpoint, and not against the request alone."""
    return not isinstance(error, openai.APIStatusError) or error.status_code in (408, 429) or error.status_code >= 500


def _may_pass(error: Exception) -> bool:
    return _is_down(error) or (isinstance(error, openai.APIStatusError) and error.status_code == 409)


def _follow_up(text: str, problem: str) -> list[Message]:
    """What tells the model that its answer does not fit."""
    told = f"This answer cannot be used: {problem}. Answer once more, with the JSON asked for and nothing else."
    return [
        {"role": "assistant", "content": text[:LONGEST_QUOTE] or "(no answer)"},
        {"role": "user", "content": told},
    ]


def _parts(messages: Sequence[Message]) -> Iterator[dict[str, Any]]:
    for message in messages:
        if isinstance(message["content"], list):
            yield from message["content"]


def _without_bytes(messages: Sequence[Message], held: Set[str]) -> list[Message]:
    def thin(part: dict[str, Any]) -> dict[str, Any]:
        return part | {"image_url": None} if part.get("uuid") in held else part

    return [
        {**message, "content": [thin(part) for part in message["content"]]}
        if isinstance(message["content"], list)
        else message
        for message in messages
    ]


def _usage(response: Any) -> dict[str, int]:
    """Tokens of a response that tells them."""
    usage = getattr(response, "usage", None)
    details = getattr(usage, "prompt_tokens_details", None)
    counts = (
        getattr(usage, "prompt_tokens", None),
        getattr(details, "cached_tokens", None),
        getattr(usage, "completion_tokens", None),
    )
    return {name: count for name, count in zip(TOKENS, counts, strict=True) if isinstance(count, int)}
