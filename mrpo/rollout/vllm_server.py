"""Rollouts on vLLM servers elsewhere: other GPUs of this host, or other hosts.

A request is a chat with images whose answer holds token ids, so nothing is tokenised twice, and the prompt's ids as the
server used them, which are compared with ours. Requests go to the server with the fewest under way. New weights are
broadcast in a process group with the servers' workers, written to a folder that all share, or sent over HTTP in
buckets. `server_command` starts such a server.
"""

from __future__ import annotations

import base64
import io
import itertools
import json
import shlex
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any, TypeVar

from PIL import Image

from mrpo.backbones import Processor, model_folder
from mrpo.config import Config
from mrpo.errors import UserError
from mrpo.records import Completion, EncodedPrompt
from mrpo.rollout import OnDone, SamplingParams, Weights
from mrpo.rollout.server_client import RefusedError, Server, ServerError
from mrpo.rollout.server_push import make_push
from mrpo.rollout.vllm_request import (
    LOGPROBS_MODE,
    check_expansion,
    end_ids,
    make_completion,
    prompt_seeds,
    sampling_fields,
)

if TYPE_CHECKING:  # it loads DeepSpeed, which greets on stdout
    from mrpo.runtime import Runtime

_TRIES = 4
_MAX_REQUESTS = 64
# Of a model's configuration, what says which weights fit.
_SHAPES = (
    *("model_type", "vocab_size", "hidden_size", "out_hidden_size", "intermediate_size", "num_hidden_layers", "depth"),
    *("num_attention_heads", "num_heads", "num_key_value_heads", "head_dim", "patch_size", "spatial_merge_size"),
    "image_seq_length",
)

T = TypeVar("T")


class VLLMServerEngine:
    """Completions from the servers of `rollout.servers`. Every process is a client of all of them.

    Args:
        max_images: the most images in a prompt.
        sleep: waits between the tries of a request.

    Raises:
        UserError: a server is down, was started otherwise than `server_command` says, or serves another model.
    """

    def __init__(
        self,
        config: Config,
        processor: Processor,
        runtime: Runtime,
        *,
        max_images: int = 1,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        self._config = config
        self._processor = processor
        self._runtime = runtime
        self._eos_ids = end_ids(config.model, processor)
        self._sleep = sleep
        self._lock = threading.Lock()
        urls = config.rollout.servers
        # Processes begin at different servers, so that few requests spread, too.
        first = runtime.rank % len(urls)
        self._servers = [Server(url, config.rollout.server_timeout) for url in [*urls[first:], *urls[:first]]]
        self._command = shlex.join(server_command(config, max_images))
        for server in self._servers:
            self._check(server)
        # The first process sends for all.
        self._push = make_push(config.rollout, self._servers, runtime.device) if runtime.is_main else None

    def generate(
        self, prompts: Sequence[EncodedPrompt], params: SamplingParams, on_done: OnDone | None = None
    ) -> list[list[Completion]]:
        """`params.num_completions` completions of each prompt, in order; `on_done` is called by several threads.

        Raises:
            UserError: no server answers any more, or one refuses.
            RuntimeError: a server expands the prompt otherwise than we do.
        """

        def one(i: int, seed: int | None) -> list[Completion]:
            done: dict[int, Completion] = {}

            def tell(index: int, completion: Completion) -> None:
                if index not in done:  # a request that is tried again draws the same completions again
                    done[index] = completion
                    if on_done is not None:
                        on_done(i, index, completion)

            self._try(lambda server: self._complete(server, prompts[i], params, seed, tell))
            return [done[index] for index in range(params.num_completions)]

        if not prompts:
            return []
        with ThreadPoolExecutor(max_workers=min(len(prompts), _MAX_REQUESTS)) as pool:
            return list(pool.map(one, range(len(prompts)), prompt_seeds(params, len(prompts))))

    def sync(self, weights: Weights) -> None:
        """Brings the trained weights to every server; all processes call this, the first one sends."""
        self._runtime.barrier()  # nobody generates any more
        if self._push is not None:
            self._push(weights)
        else:
            for _ in weights():
                pass
        self._runtime.barrier()

    def sleep(self) -> None:
        """Nothing to give back: the memory is another device's."""

    def close(self) -> None:
        """Nothing to end: the servers are not ours."""

    def _complete(
        self,
        server: Server,
        prompt: EncodedPrompt,
        params: SamplingParams,
        seed: int | None,
        tell: Callable[[int, Completion], None],
    ) -> None:
        """Asks `server` for the completions of one prompt and tells of each as it ends."""
        token_ids: dict[int, list[int]] = {i: [] for i in range(params.num_completions)}
        logprobs: dict[int, list[float]] = {i: [] for i in token_ids}
        finished = 0
        for event in server.stream("/v1/chat/completions", self._request(server, prompt, params, seed)):
            if event.get("prompt_token_ids") is not None:
                check_expansion(prompt, event["prompt_token_ids"])
            for choice in event["choices"]:
                i = choice["index"]
                token_ids[i] += choice.get("token_ids") or []
                if choice.get("logprobs"):
                    logprobs[i] += [token["logprob"] for token in choice["logprobs"]["content"]]
                if choice.get("finish_reason") is not None:
                    known = logprobs[i] if params.temperature > 0 else None
                    tell(i, make_completion(token_ids[i], choice["finish_reason"], known, self._processor))
                    finished += 1
        if finished < params.num_completions:
            raise ConnectionError(f"{server.url} ended its answer after {finished} of {params.num_completions}")

    def _request(
        self, server: Server, prompt: EncodedPrompt, params: SamplingParams, seed: int | None
    ) -> dict[str, Any]:
        images = [{"type": "image_url", "image_url": {"url": _data_url(picture)}} for picture in prompt.pictures]
        fields = sampling_fields(params, seed, self._eos_ids, self._processor.placeholder_ids)
        options = self._processor.family.processor_options(self._processor.image_processor)
        return fields | {
            "model": server.model,
            "messages": [{"role": "user", "content": [*images, {"type": "text", "text": prompt.message}]}],
            "logprobs": params.temperature > 0,
            "top_logprobs": 0,
            "return_token_ids": True,
            "stream": True,
            **({"mm_processor_kwargs": options} if options else {}),
        }

    def _try(self, ask: Callable[[Server], T]) -> T:
        """`ask` of the least busy server, and of others while connections fail.

        Raises:
            UserError: none of the tries came through, or a server refuses.
        """
        failed: set[str] = set()
        for attempt in itertools.count(1):
            with self._lock:
                server = min(self._servers, key=lambda s: (s.url in failed, s.requests))
                server.requests += 1
            try:
                return ask(server)
            except (OSError, ServerError) as error:
                if isinstance(error, RefusedError):
                    raise UserError(f"rollout.servers: {server.url} refuses a request: {error}") from error
                if attempt == _TRIES:
                    raise UserError(f"rollout.servers: {server.url} does not answer: {error}") from error
                failed.add(server.url)
                self._sleep(2.0**attempt)
            finally:
                with self._lock:
                    server.requests -= 1
        raise AssertionError("unreachable")

    def _check(self, server: Server) -> None:
        start = f"; start it with\n    VLLM_SERVER_DEV_MODE=1 {self._command}"
        try:
            server.model = server.get("/v1/models")["data"][0]["id"]
            served, *others = server.call("mrpo_describe")
            server.workers = 1 + len(others)
        except (OSError, ServerError, KeyError, IndexError, ValueError) as error:
            raise UserError(f"rollout.servers: {server.url} is no server for rollouts: {error}{start}") from error
        problems = self._differences(served)
        if problems:
            raise UserError(f"rollout.servers: {server.url} {'; '.join(problems)}{start}")

    def _differences(self, served: dict[str, Any]) -> list[str]:
        """What is wrong with a server that describes itself as `served`."""
        config, model = self._config, self._config.model
        ours, theirs = (_architecture(c) for c in (self._processor.model_config.to_dict(), served["model"]))
        problems = [
            f"serves another model than model.path={model.path}: its {key} is {theirs.get(key)}, not {ours[key]}"
            for key in sorted(ours.keys() & theirs.keys())
            if ours[key] != theirs[key]
        ][:1]
        length = config.prompt.max_tokens + config.rollout.max_tokens
        if served["max_model_len"] < length:
            problems.append(f"holds {served['max_model_len']} tokens, fewer than prompt and completion, {length}")
        for key, right in {"dtype": model.dtype, "logprobs_mode": LOGPROBS_MODE}.items():
            if served[key] != right:
                problems.append(f"runs with {key}={served[key]}, not {right}")
        return problems


def server_command(config: Config, max_images: int = 1) -> list[str]:
    """The command that starts a server for `config`, to be run with VLLM_SERVER_DEV_MODE=1 in its environment.

    That mode opens routes by which anyone who reaches the port can change the model: keep it on a private network.
    """
    length = config.prompt.max_tokens + config.rollout.max_tokens
    options = {
        "dtype": config.model.dtype,
        "max-model-len": length,
        "worker-extension-cls": "mrpo.rollout.vllm_worker.WeightReceiver",
        "logprobs-mode": LOGPROBS_MODE,
        "generation-config": "vllm",
        # A chunk when a completion begins and one when it ends, instead of one for every token.
        "stream-interval": length,
        "chat-template-content-format": "openai",
        "limit-mm-per-prompt": json.dumps({"image": max_images, "video": 0}, separators=(",", ":")),
    }
    words = [word for name, value in options.items() for word in (f"--{name}", str(value))]
    return ["python", "-m", "vllm.entrypoints.openai.api_server", "--model", model_folder(config.model.path), *words]


def _architecture(config: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """The fields of a configuration and its parts that shape the weights, under dotted names."""
    found: dict[str, Any] = {}
    for key, value in config.items():
        if isinstance(value, dict):
            found |= _architecture(value, f"{prefix}{key}.")
        elif key in _SHAPES:
            found[prefix + key] = list(value) if isinstance(value, tuple) else value
    return found


def _data_url(picture: Image.Image) -> str:
    content = io.BytesIO()
    picture.save(content, format="PNG", compress_level=1)
    return f"data:image/png;base64,{base64.b64encode(content.getvalue()).decode()}"
