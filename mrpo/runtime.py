"""The processes of a run: rank, device, and the few collectives that the trainer needs.

Everything that crosses processes goes through here, so that the rest of the code reads as if there were one.
"""

from __future__ import annotations

import os
import random
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import deepspeed
import numpy as np
import torch
import torch.distributed as dist
from deepspeed.accelerator import get_accelerator

from mrpo.errors import UserError
from mrpo.stale_locks import extension_root, remove_stale_locks

# Processes may wait for each other while one of them reads data or retries a judge.
TIMEOUT = timedelta(hours=2)


@dataclass(frozen=True)
class Runtime:
    """One process of `world_size`. Made by `Runtime.start`, ended by `finish`.

    What processes tell each other here are numbers of the host, and they go by way of the host (gloo): through the
    device's own queue they would wait for all the work in it. `group` None is the default group, on CPUs gloo's, too.
    """

    rank: int
    world_size: int
    device: torch.device
    group: Any = None

    @classmethod
    def start(cls, seed: int) -> Runtime:
        """Joins the process group that the DeepSpeed launcher describes in the environment (alone if there is none).

        Raises:
            UserError: the processes cannot reach each other.
        """
        for key, value in {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"}.items():
            os.environ.setdefault(key, value)
        os.environ.setdefault("MASTER_ADDR", "127.0.0.1")
        os.environ.setdefault("MASTER_PORT", "29500")
        accelerator = get_accelerator()
        local_rank = int(os.environ["LOCAL_RANK"])
        accelerator.set_device(local_rank)
        if int(os.environ.get("CROSS_SIZE", "1")) == 1:  # the launcher's number of hosts
            remove_stale_locks(extension_root())
        random.seed(seed)
        np.random.seed(seed % 2**32)
        torch.manual_seed(seed)
        device = torch.device(accelerator.device_name(local_rank))
        try:
            deepspeed.init_distributed(verbose=False, timeout=TIMEOUT)
            group = None if device.type == "cpu" else dist.new_group(backend="gloo", timeout=TIMEOUT)
            runtime = cls(dist.get_rank(), dist.get_world_size(), device, group)
            runtime.barrier()
        except RuntimeError as error:
            reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
            raise UserError(
                f"the processes of the run cannot reach each other ({reason}); check "
                f"MASTER_ADDR={os.environ['MASTER_ADDR']} and MASTER_PORT={os.environ['MASTER_PORT']}, and where "
                "hosts have several network interfaces name theirs in GLOO_SOCKET_IFNAME and NCCL_SOCKET_IFNAME"
            ) from error
        _forget_shared_buffers()
        return runtime

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def barrier(self) -> None:
        dist.barrier(self.group)

    def gather_rows(self, rows: torch.Tensor) -> torch.Tensor:
        """(n, c) rows of every process as one (world_size * n, c) tensor, in rank order; n is the same everywhere."""
        parts = [torch.empty_like(rows) for _ in range(self.world_size)]
        dist.all_gather(parts, rows, group=self.group)
        return torch.cat(parts)

    def gather_objects(self, item: Any) -> list[Any]:
        """`item` of every process, in rank order. For rare and small things."""
        items: list[Any] = [None] * self.world_size
        dist.all_gather_object(items, item, group=self.group)
        return items

    def exchange(self, outgoing: Sequence[Any]) -> list[Any]:
        """What every process has for this one, in rank order; `outgoing[r]` goes to process r. For rare things."""
        return [sent[self.rank] for sent in self.gather_objects(list(outgoing))]

    def sum(self, values: torch.Tensor) -> torch.Tensor:
        """The sum of `values` over processes, on the CPU."""
        total = values.to("cpu", copy=True)
        dist.all_reduce(total, group=self.group)
        return total

    def any(self, flag: bool) -> bool:
        """Whether `flag` is set on any process."""
        return bool(self.sum(torch.tensor([float(flag)])).item())

    def finish(self, status: int = 0) -> None:
        """Leaves the process group and ends the process with `status`.

        ZeRO-3's communication threads can abort an interpreter that shuts down in the ordinary way, hence `_exit`.
        """
        if status == 0:
            self.barrier()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def _forget_shared_buffers() -> None:
    """Takes the name from the 66 MiB that DeepSpeed's collectives on CPUs share, which would stay after a crash.

    To be called when every process of this machine has them open: they last until the last one is gone.
    """
    address, port = os.environ["MASTER_ADDR"], os.environ["MASTER_PORT"]
    name = f"deepspeed_allreduce_buffer_{os.getuid()}_{address}_{port}_{dist.get_rank()}"
    (Path("/dev/shm") / name).unlink(missing_ok=True)
