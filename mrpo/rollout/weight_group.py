"""Weights from the trainer to the workers of vLLM servers, through a process group that they form for that alone.

Broadcasts go from device to device: NCCL between GPUs, gloo between CPUs. The trainer is member 0.
"""

from __future__ import annotations

import json
import socket
from collections.abc import Iterable, Iterator, Sequence
from datetime import timedelta
from math import prod
from typing import Any

import torch
import torch.distributed as dist

BUCKET_BYTES = 1 << 28
_FINDING = timedelta(seconds=60)
_ALIGNMENT = 16  # bytes: a view of another dtype must begin at a multiple of its size


class WeightGroup:
    """One member of the group of `size`, who find each other behind `store`.

    Args:
        address: of this host, where the others reach it.
        seconds: how long to wait for the others in a broadcast.
    """

    def __init__(
        self, store: dist.TCPStore, rank: int, size: int, device: torch.device, *, address: str, seconds: float
    ) -> None:
        self._device = device
        self._patience = timedelta(seconds=seconds)
        self._group = _make_group(store, rank, size, device, address, self._patience)
        self._broadcast(torch.zeros(1, dtype=torch.uint8, device=device))  # who cannot be reached shows here

    def send(self, weights: Iterable[tuple[str, torch.Tensor]], limit: int = BUCKET_BYTES) -> None:
        """Member 0: brings names and tensors to all others, in buckets of at most `limit` bytes (one tensor at least).

        Raises:
            RuntimeError: a member did not answer in time.
        """
        entries: list[tuple[str, str, list[int]]] = []
        buffer, used = self._empty(limit), 0
        for name, tensor in weights:
            end = used + _aligned(tensor.nbytes)
            if entries and end > len(buffer):
                self._send_bucket(entries, buffer[:used])
                entries, used, end = [], 0, _aligned(tensor.nbytes)
            if end > len(buffer):
                buffer = self._empty(end)
            # At once, so that whoever gathered the weight may let go of it.
            buffer[used : used + tensor.nbytes].view(tensor.dtype).copy_(tensor.detach().reshape(-1))
            entries.append((name, str(tensor.dtype).removeprefix("torch."), list(tensor.shape)))
            used = end
        if entries:
            self._send_bucket(entries, buffer[:used])
        self._broadcast(torch.zeros(2, dtype=torch.int64, device=self._device))

    def receive(self) -> Iterator[tuple[str, torch.Tensor]]:
        """The others: what member 0 sends, on this member's device. To be iterated to the end. Raises as `send`."""
        while True:
            sizes = torch.empty(2, dtype=torch.int64, device=self._device)
            self._broadcast(sizes)
            header_bytes, size = sizes.tolist()
            if not header_bytes:
                return
            content = self._empty(header_bytes)
            self._broadcast(content)
            buffer = self._empty(size)
            self._broadcast(buffer)
            place = 0
            for name, dtype_name, shape in json.loads(bytes(content.tolist())):
                dtype = getattr(torch, dtype_name)
                nbytes = prod(shape) * dtype.itemsize
                yield name, buffer[place : place + nbytes].view(dtype).view(shape)
                place += _aligned(nbytes)

    def _send_bucket(self, entries: Sequence[tuple[str, str, list[int]]], buffer: torch.Tensor) -> None:
        header = json.dumps(entries).encode()
        self._broadcast(torch.tensor([len(header), len(buffer)], device=self._device))
        self._broadcast(torch.tensor(list(header), dtype=torch.uint8, device=self._device))
        self._broadcast(buffer)

    def _empty(self, size: int) -> torch.Tensor:
        return torch.empty(size, dtype=torch.uint8, device=self._device)

    def _broadcast(self, tensor: torch.Tensor) -> None:
        options = dist.BroadcastOptions()
        options.rootRank, options.rootTensor, options.timeout = 0, 0, self._patience
        self._group.broadcast([tensor], options).wait()


def open_store(size: int) -> dist.TCPStore:
    """Where `size` members find each other: a port of this host, which `store.port` names.

    Whoever reaches it could take a member's place: for private networks, as the servers' own ports.
    """
    return dist.TCPStore("0.0.0.0", 0, size, is_master=True, timeout=_FINDING, wait_for_workers=False)


def find_store(host: str, port: int, size: int) -> dist.TCPStore:
    """The store that another process opened.

    Raises:
        RuntimeError: nothing answers there.
    """
    return dist.TCPStore(host, port, size, is_master=False, timeout=_FINDING, wait_for_workers=False)


def own_address(host: str, port: int) -> str:
    """The address of this host on the way to another one; nothing is sent.

    Raises:
        OSError: there is no way.
    """
    (family, kind, _, _, address), *_ = socket.getaddrinfo(host, port, type=socket.SOCK_DGRAM)
    with socket.socket(family, kind) as probe:
        probe.connect(address)
        return str(probe.getsockname()[0])


def _make_group(
    store: dist.TCPStore, rank: int, size: int, device: torch.device, address: str, patience: timedelta
) -> Any:
    if device.type == "cuda":
        options = dist.ProcessGroupNCCL.Options()
        options._timeout = patience
        return dist.ProcessGroupNCCL(store, rank, size, options)
    gloo: Any = dist.ProcessGroupGloo
    options = gloo._Options()
    options._timeout = min(_FINDING, patience)  # of the meeting; a broadcast has its own
    options._devices = [gloo.create_device(hostname=address)]
    return gloo(store, rank, size, options)


def _aligned(nbytes: int) -> int:
    return -(-nbytes // _ALIGNMENT) * _ALIGNMENT
