"""New weights on their way to vLLM servers: in a process group, by a folder that all share, or over HTTP."""

from __future__ import annotations

import base64
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from ipaddress import ip_address
from itertools import accumulate
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, TypeAlias

import safetensors.torch
import torch

from mrpo.config import RolloutConfig
from mrpo.errors import UserError
from mrpo.rollout import Weights
from mrpo.rollout.server_client import Server, ServerError
from mrpo.rollout.weight_group import BUCKET_BYTES, WeightGroup, open_store

_REFUSED = "did not take the new weights"

# Brings weights to all servers, whose caches are reset. Raises UserError where one does not take them.
Push: TypeAlias = Callable[[Weights], None]


def make_push(config: RolloutConfig, servers: Sequence[Server], device: torch.device) -> Push:
    """The way that `config` names, from this process, whose weights are on `device`.

    Raises:
        UserError: servers and this process cannot form a process group.
    """
    if config.sync_folder is not None:
        return FolderPush(servers, config.sync_folder)
    if config.sync_group:
        return GroupPush(servers, device, config.server_timeout)
    return HttpPush(servers)


class GroupPush:
    """Broadcasts to the workers of all servers at once, from device to device."""

    def __init__(self, servers: Sequence[Server], device: torch.device, seconds: float) -> None:
        self._servers = servers
        size = 1 + sum(server.workers for server in servers)
        # Servers on this host are reached at a loopback address, where others would look for us in vain.
        address = min((server.own_address() for server in servers), key=lambda found: ip_address(found).is_loopback)
        # First the meeting place alone: who cannot reach it says so at once, where forming the group would wait.
        store = open_store(size)
        mend = "rollout.sync_group=false sends weights over HTTP instead"
        failure = f"has workers that cannot reach this process at {address}:{store.port} ({mend})"
        on_all(servers, failure, lambda server: server.call("mrpo_find_store", address, str(store.port), str(size)))
        firsts = accumulate((server.workers for server in servers[:-1]), initial=1)
        first = dict(zip((server.url for server in servers), firsts, strict=True))
        failure = f"forms no process group with this process ({mend})"

        def join(server: Server) -> None:
            server.call("mrpo_join", str(first[server.url]), str(size), str(seconds))

        with answering(servers, failure, join):
            self._group = WeightGroup(store, 0, size, device, address=address, seconds=seconds)

    def __call__(self, weights: Weights) -> None:
        # Without one of its members a broadcast would wait for `seconds`.
        on_all(self._servers, _REFUSED, self._require_members)
        with answering(self._servers, _REFUSED, lambda server: server.call("mrpo_receive_weights")):
            self._group.send(weights())
        on_all(self._servers, _REFUSED, Server.reset_caches)

    @staticmethod
    def _require_members(server: Server) -> None:
        if not all(server.call("mrpo_is_member")):
            raise ServerError("it was started anew and has left the process group; go on with --resume")


class FolderPush:
    """Writes files to a folder, which all servers read."""

    def __init__(self, servers: Sequence[Server], folder: Path) -> None:
        self._servers = servers
        self._folder = folder.resolve()

    def __call__(self, weights: Weights) -> None:
        self._folder.mkdir(parents=True, exist_ok=True)
        # A folder of its own: a server loads all that is there, and a push that was killed leaves files behind.
        with TemporaryDirectory(prefix="weights-", dir=self._folder) as folder:
            Path(folder).chmod(0o755)  # servers may run as another user
            for i, bucket in enumerate(buckets(weights())):
                safetensors.torch.save_file(bucket, Path(folder, f"{i:05d}.safetensors"))
            on_all(self._servers, _REFUSED, partial(self._load, folder))

    @staticmethod
    def _load(folder: str, server: Server) -> None:
        server.call("mrpo_load_from_folder", folder)
        server.reset_caches()


class HttpPush:
    """Sends buckets one after the other, to all servers at once."""

    def __init__(self, servers: Sequence[Server]) -> None:
        self._servers = servers

    def __call__(self, weights: Weights) -> None:
        position, waiting = "first", None
        for bucket in buckets(weights()):
            if waiting is not None:
                self._send(position, waiting)
                position = "next"
            waiting = bucket
        if waiting is not None:
            self._send("only" if position == "first" else "last", waiting)
        on_all(self._servers, _REFUSED, Server.reset_caches)

    def _send(self, position: str, bucket: dict[str, torch.Tensor]) -> None:
        content = base64.b64encode(safetensors.torch.save(bucket)).decode()
        on_all(self._servers, _REFUSED, lambda server: server.call("mrpo_receive_bucket", position, content))


def on_all(servers: Sequence[Server], failure: str, act: Callable[[Server], Any]) -> None:
    """`act` on every server at once.

    Raises:
        UserError: one of them failed, which is told as its `failure`.
    """

    def guarded(server: Server) -> None:
        try:
            act(server)
        except (OSError, ServerError) as error:
            raise UserError(f"rollout.servers: {server.url} {failure}: {error}") from error

    with ThreadPoolExecutor(max_workers=len(servers)) as pool:
        list(pool.map(guarded, servers))


@contextmanager
def answering(servers: Sequence[Server], failure: str, act: Callable[[Server], Any]) -> Iterator[None]:
    """`act` on every server at once while the block runs, whose workers it talks to.

    Raises:
        UserError: one of them failed, or the block raised RuntimeError.
    """
    with ThreadPoolExecutor(1) as pool:
        answers = pool.submit(on_all, servers, failure, act)
        try:
            yield
        except RuntimeError as error:
            answers.result()  # says more, if it failed, too
            raise UserError(f"rollout.servers: one {failure}: {error}") from error
        answers.result()


def buckets(
    weights: Iterator[tuple[str, torch.Tensor]], limit: int = BUCKET_BYTES
) -> Iterator[dict[str, torch.Tensor]]:
    """Weights in host memory, in parts of at most `limit` bytes (one weight at least)."""
    bucket: dict[str, torch.Tensor] = {}
    size = 0
    for name, tensor in weights:
        if bucket and size + tensor.nbytes > limit:
            yield bucket
            bucket, size = {}, 0
        bucket[name] = tensor.detach().to("cpu", copy=True).contiguous()
        size += tensor.nbytes
    if bucket:
        yield bucket
